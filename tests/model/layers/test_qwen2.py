from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reference.slow_timeviper import slow_logits, slow_loss_sum, slow_scores
from reference.small_models import SMALL_QWEN, VOCAB_SIZE, first_tokens, make_features, make_model, make_sample, pack
from timeviper_model.batching.batch import TokenKind, pack_samples
from timeviper_model.batching.segments import Segments
from timeviper_model.config import PRESETS, Qwen2Config, TransVSite
from timeviper_model.inference.prefill import prefill
from timeviper_model.layers.transv import TokenStream, apply_site
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import from_pretrained, load_backbone, load_text_config, save_pretrained

LAYOUTS = ["sss" + "v" * 24 + "iiii" + "rrrr", "ssiiirrrr", "vvvvvvvviirrriirr", "vviivvvvvirr", "v"]
NO_VISION = torch.zeros(0, SMALL_QWEN.vision.hidden_size)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def llm_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(5)
    config = transformers.Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=request.param,
        initializer_range=0.25,
        rms_norm_eps=1e-5,
        eos_token_id=[7, 8],
    )
    model = transformers.Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():  # initial biases of 0 and norms of 1 would hide a missing one
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    folder = tmp_path_factory.mktemp("qwen2")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def oracle(llm_folder: Path) -> Any:
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM.from_pretrained(llm_folder, dtype=torch.float32).eval()


@pytest.fixture
def ours(llm_folder: Path) -> TimeViper:
    model = make_model(replace(SMALL_QWEN, text=load_text_config(llm_folder), transv=()), dtype=torch.float32)
    load_backbone(model, llm_folder)
    return model


def test_sizes_are_those_that_transformers_saved(llm_folder: Path) -> None:
    config = load_text_config(llm_folder)
    assert isinstance(config, Qwen2Config)
    assert (config.rope_theta, config.rms_norm_eps, config.num_hidden_layers) == (100.0, 1e-5, 3)
    assert (config.head_dim, config.eos_token_id) == (6, (7, 8))


@pytest.mark.parametrize("length", [1, 8, 61])
def test_logits_equal_those_of_transformers(length: int, ours: TimeViper, oracle: Any) -> None:
    ids = torch.tensor([make_sample("i" * length, seed=length).input_ids])
    with torch.no_grad():
        expected = oracle(input_ids=ids).logits[0]
    assert expected.std() > 0.3, "a model that says nothing would pass any comparison"
    cache = ours.new_cache(1, device="cpu", dtype=torch.float32)
    for index in {0, length // 2, length - 1}:
        prompt = first_tokens(make_sample("i" * length, seed=length), index + 1)
        logits = prefill(ours, pack_samples([prompt], [NO_VISION]), cache, 0)
        torch.testing.assert_close(logits, expected[index], rtol=1e-4, atol=1e-4)


def test_every_gradient_equals_that_of_transformers(ours: TimeViper, oracle: Any) -> None:
    sample = make_sample("i" + "r" * 40)
    ids = torch.tensor([sample.input_ids])
    out = ours(pack_samples([sample], [NO_VISION]))
    loss = out.loss_sum / out.num_targets
    loss.backward()
    expected = F.cross_entropy(oracle(input_ids=ids).logits[0, :-1], ids[0, 1:])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    found = {name.replace("backbone.", "model.", 1): p.grad for name, p in ours.named_parameters()}
    names = {"model.embed_tokens.weight": "model.embeddings.weight", "model.norm.weight": "model.norm_f.weight"}
    for name, parameter in oracle.named_parameters():
        grad = found[names.get(name, name)]
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_greedy_generation_equals_transformers(ours: TimeViper, oracle: Any) -> None:
    prompts = [make_sample("i" * 19, seed=seed) for seed in range(4)]
    ids = torch.tensor([prompt.input_ids for prompt in prompts])
    with torch.no_grad():
        expected = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
    cache = ours.new_cache(4, device="cpu", dtype=torch.float32)
    first = [prefill(ours, pack_samples([prompt], [NO_VISION]), cache, n).argmax() for n, prompt in enumerate(prompts)]
    tokens = [torch.stack(first)]
    for _ in range(11):
        tokens.append(ours.decode_step(tokens[-1], cache, torch.arange(4)).argmax(-1))
    found = torch.stack(tokens, dim=1)
    assert torch.equal(found, expected[:, 19:])
    assert len(found.unique()) > 3, "a model that repeats itself would pass any comparison"


def test_saved_folder_has_the_names_and_keys_of_hugging_face(llm_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import Qwen2Config as TheirConfig

    config = replace(SMALL_QWEN, text=load_text_config(llm_folder))
    model = make_model(config, dtype=torch.float32)
    load_backbone(model, llm_folder)
    save_pretrained(model, tmp_path / "weights")
    theirs = load_file(llm_folder / "model.safetensors")
    saved = load_file(tmp_path / "weights" / "model-00001-of-00001.safetensors")
    assert {name for name in saved if not name.startswith(("projector", "transv"))} == set(theirs)
    assert all(torch.equal(saved[name], tensor) for name, tensor in theirs.items())
    assert "model.layers.0.self_attn.q_proj.bias" in saved
    raw = json.loads((tmp_path / "weights" / "config.json").read_text())["text_config"]
    read = TheirConfig.from_dict(raw)
    assert raw["model_type"] == "qwen2"
    assert read.rope_parameters["rope_theta"] == 100.0
    assert read.layer_types == ["full_attention"] * 3
    loaded = from_pretrained(tmp_path / "weights")
    assert loaded.config == config
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layer_types", ["full_attention", "full_attention", "sliding_attention"], "use_sliding_window"),
        ("rope_parameters", {"rope_type": "linear", "factor": 4.0}, "RoPE of type 'linear'"),
        ("num_key_value_heads", 3, "num_key_value_heads = 3"),
        ("model_type", "llama", "model_type is 'llama'; supported are nemotron_h and qwen2"),
    ],
)
def test_variants_that_are_not_supported_are_refused(
    llm_folder: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    raw = json.loads((llm_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(ValueError, match=message):
        load_text_config(tmp_path)


def features_of(layout: str, seed: int) -> tuple[Any, Tensor]:
    sample = make_sample(layout, seed=seed)
    return sample, make_features(sample, seed=sum(sample.input_ids))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_samples_with_transv_equal_the_formulas_written_out(layout: str) -> None:
    model = make_model(SMALL_QWEN)
    samples = [features_of("svvvviirrr", 7), features_of(layout, 8), features_of("ssiiirr", 9)]
    expected = sum(slow_loss_sum(model, sample, features).item() for sample, features in samples)
    assert model(pack([sample for sample, _ in samples])).loss_sum.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_that_differ_only_in_position_are_selected_by_original_position(seed: int) -> None:
    model = make_model(SMALL_QWEN)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(60, generator=generator)[:22].sort().values
    kinds = [TokenKind.SYSTEM, *[TokenKind.VISION] * 20, TokenKind.INSTRUCTION]
    hidden = torch.randn(1, 24, generator=generator, dtype=torch.float64).repeat(22, 1)
    stream = TokenStream(
        hidden_TD=hidden,
        segments=Segments(torch.zeros(22, dtype=torch.long), 1, indices),
        token_kind_T=torch.tensor(kinds, dtype=torch.int8),
        labels_T=torch.arange(22),
        original_counts=(20,),
    )
    site = TransVSite(layer=2, select="attention", keep=0.4, transfer="none")
    kept = apply_site(stream, site, None, model.backbone.block(2)).labels_T.tolist()
    prefix = "backbone.layers.2."
    block = {n.removeprefix(prefix): p for n, p in model.named_parameters() if n.startswith(prefix)}
    scores = slow_scores(hidden, indices.tolist(), list(kinds), block, model.config.text)
    ranked = sorted(range(1, 21), key=lambda index: (-scores[index], index))
    assert kept == [0, *sorted(ranked[:8]), 21]


def test_packed_samples_equal_separate_ones_in_every_gradient_with_transv() -> None:
    model = make_model(SMALL_QWEN, dtype=torch.float32)
    samples = [make_sample(layout, seed=n) for n, layout in enumerate(LAYOUTS)]

    def gradients(chosen: list[Any], pad_to: int | None = None) -> dict[str, Tensor]:
        model.zero_grad()
        model(pack(chosen, dtype=torch.float32, pad_to=pad_to)).loss_sum.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    packed, separate = gradients(samples, pad_to=100), [gradients([sample]) for sample in samples]
    assert set(packed) == {name for name, _ in model.named_parameters()}
    for name, grad in packed.items():
        total = torch.stack([part[name] for part in separate]).sum(0)
        torch.testing.assert_close(grad, total, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", ["sss" + "v" * 24 + "iiii" + "rrrr", "ssiiirrrr"])
def test_prefill_and_decode_equal_teacher_forcing_with_transv(layout: str) -> None:
    model = make_model(SMALL_QWEN)
    sample, features = features_of(layout, 3)
    length = layout.index("r")
    slow, _ = slow_logits(model, sample, features)
    cache = model.new_cache(3, device="cpu", dtype=torch.float64)
    prefill(model, pack([make_sample("svvvvvvii", seed=1)]), cache, 0)  # a neighbour at another position
    logits = prefill(model, pack_samples([first_tokens(sample, length)], [features]), cache, 2)
    answer = sample.input_ids[length:]
    for step, token in enumerate(answer):
        torch.testing.assert_close(logits, slow[step - len(answer) - 1].detach())
        logits = model.decode_step(torch.tensor([token, 5]), cache, torch.tensor([2, 0]))[0]
    torch.testing.assert_close(logits, slow[-1].detach())


def test_activation_checkpointing_changes_no_gradient() -> None:
    model = make_model(SMALL_QWEN)
    batch = pack([make_sample(layout, seed=n) for n, layout in enumerate(LAYOUTS)])
    model(batch).loss_sum.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing = True
    model(batch).loss_sum.backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, plain, rtol=0, atol=0)


def test_transv_starts_as_a_copy_of_the_attention_with_its_biases() -> None:
    model = make_model(SMALL_QWEN)
    model.init_transv_from_attention()
    state = model.state_dict()
    for name in ("q_proj.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.weight"):
        assert torch.equal(state[f"transv.1.{name}"], state[f"backbone.layers.1.self_attn.{name}"])


def test_qwen2_5_7b_has_its_published_size() -> None:
    with torch.device("meta"):
        model = TimeViper(PRESETS["qwen2.5-7b"])
    llm = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("backbone", "lm_head")))
    assert llm == 7_615_616_512
