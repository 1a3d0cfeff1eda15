"""On a simulated CUDA device the model has no CPU operand, generator or kernel, and computes the CPU's values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from reference.simulated_cuda import Device, simulated_cuda
from reference.small_models import SMALL, SMALL_QWEN, make_features, make_model, make_sample, pack
from timeviper_model.analysis.blocking import Blocking, cut_flow
from timeviper_model.analysis.maps import observe
from timeviper_model.analysis.pooling import equal_bins, head_statistics, pool_map
from timeviper_model.config import VisionConfig
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.prefill import prefill
from timeviper_model.inference.requests import EngineConfig, Request, Token
from timeviper_model.layers.lora import LoraConfig, add_lora
from timeviper_model.layers.tome import merge_tokens
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import from_pretrained, save_pretrained

LAYOUTS = ("ssvvvvvvvviiirriir", "siirr", "vviivvvvirr")
BATCH = pack([make_sample(layout, seed=index) for index, layout in enumerate(LAYOUTS)], pad_to=40)
TWO_TOWERS = replace(
    SMALL.vision,
    num_tokens_per_frame=2,
    second=VisionConfig(encoder="other", num_tokens_per_frame=2, hidden_size=5),
)
CONFIGS = {
    "hybrid": SMALL,
    "rope": SMALL_QWEN,
    "kept": replace(SMALL, transv=tuple(replace(site, transfer_from="kept") for site in SMALL.transv)),
    "dropping": replace(SMALL, transv=tuple(replace(site, transfer="none") for site in SMALL.transv)),
    "two towers": replace(SMALL, vision=TWO_TOWERS),
}


def slow(*values: object) -> ParameterSet:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def device() -> Iterator[Device]:
    with simulated_cuda() as device:
        yield device


def loss_and_gradients(model: TimeViper, device: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    output = model(BATCH.to(device, dtype))
    assert (
        output.loss_sum.device.type == output.num_targets.device.type == output.num_vision_tokens.device.type == device
    )
    output.loss_sum.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss_sum.detach().cpu(), **gradients}


@pytest.mark.parametrize(("name", "checkpointing"), [("hybrid", True), slow("rope", False), slow("kept", False)])
def test_loss_and_gradients(name: str, checkpointing: bool) -> None:
    expected = loss_and_gradients(make_model(CONFIGS[name]), "cpu")
    model = make_model(CONFIGS[name]).cuda()
    model.gradient_checkpointing = checkpointing
    found = loss_and_gradients(model, "cuda")
    torch.testing.assert_close(found, expected)
    assert len(found) == 1 + len(list(model.parameters()))


def test_bf16_gradients_of_adapters_behind_two_towers() -> None:
    model = make_model(CONFIGS["two towers"], dtype=torch.bfloat16).cuda()
    model.requires_grad_(False)
    add_lora(model, LoraConfig(rank=2), torch.Generator("cuda").manual_seed(0))
    found = loss_and_gradients(model, "cuda", torch.bfloat16)
    assert {name.rsplit(".", 1)[1] for name in found if "." in name} == {"lora_A", "lora_B"}
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())


def test_loss_in_chunks_and_target_log_probs() -> None:
    model = make_model()
    model.logits_elements = 2 * SMALL.text.vocab_size
    expected = loss_and_gradients(model, "cpu")
    model = make_model().cuda()
    model.logits_elements = 2 * SMALL.text.vocab_size
    torch.testing.assert_close(loss_and_gradients(model, "cuda"), expected)
    log_probs, segment_ids = model.target_log_probs(BATCH.to("cuda"))
    assert -float(log_probs.sum()) == pytest.approx(float(expected["loss"]))
    assert segment_ids.device.type == "cuda"


def prompt_logits(model: TimeViper, device: str, max_chunk_tokens: int, dtype: torch.dtype) -> Tensor:
    """Logits after two prompts and after one more token of each, with a free slot between."""
    cache = model.new_cache(3, device=device, dtype=dtype)
    rows = []
    for slot, layout in ((0, "ssvvvvvvvviiii"), (2, "svvvvii")):
        batch = pack([make_sample(layout, seed=slot)]).to(device, dtype)
        rows.append(prefill(model, batch, cache, slot, max_chunk_tokens=max_chunk_tokens))
    ids, slots = torch.tensor([3, 5], device=device), torch.tensor([2, 0], device=device)
    return torch.cat([torch.stack(rows), model.decode_step(ids, cache, slots)]).cpu()


@pytest.mark.parametrize(
    ("name", "max_chunk_tokens"),
    [("hybrid", 3), slow("rope", 3), slow("kept", 2048), slow("dropping", 3), slow("two towers", 3)],
)
def test_prefill_and_decode_step(name: str, max_chunk_tokens: int) -> None:
    model = make_model(CONFIGS[name]).eval()
    expected = prompt_logits(model, "cpu", max_chunk_tokens, torch.float64)
    torch.testing.assert_close(prompt_logits(model.cuda(), "cuda", max_chunk_tokens, torch.float64), expected)
    found = prompt_logits(model.to(torch.bfloat16), "cuda", max_chunk_tokens, torch.bfloat16)
    assert bool(found.isfinite().all())


def request(question: str, *, seed: int, **values: object) -> Request:
    sample = make_sample("ss" + "v" * 12 + question, seed=seed)
    video = make_sample("v" * 12)
    sampling = SamplingParams(max_new_tokens=5, seed=seed)
    options = {"vision_features": make_features(video), "prefix_key": "film", "sampling": sampling}
    return Request(prompt=replace(sample, input_ids=[1] * 14 + sample.input_ids[14:]), **options | values)  # type: ignore[arg-type]


def answers(model: TimeViper) -> list[list[Token]]:
    """Greedy, sampled and prefix-sharing requests, one of them cancelled."""
    sampling = SamplingParams(max_new_tokens=5, seed=2, temperature=1.0, top_p=0.9, top_k=20, num_logprobs=3)
    engine = InferenceEngine(model, EngineConfig(num_slots=2, max_prefill_tokens=5, prefix_cache_bytes=1 << 20))
    ids = [
        engine.submit(request("iii", seed=1)),
        engine.submit(request("iiii", seed=2, sampling=sampling)),
        engine.submit(request("ii", seed=3)),
    ]
    cancelled = engine.submit(request("i", seed=4))
    events = [event for _ in range(6) for event in engine.step()]
    assert engine.cancel(cancelled)
    while engine.has_work:
        events += engine.step()
    assert engine.stats().prefix_hits == 2
    return [[event for event in events if isinstance(event, Token) and event.request_id == own] for own in ids]


@pytest.mark.parametrize("name", [slow("hybrid"), slow("rope")])
def test_the_engine_gives_the_same_answers(name: str) -> None:
    model = make_model(CONFIGS[name]).eval()
    expected = answers(model)
    for own, other in zip(answers(model.cuda()), expected, strict=True):
        assert [token.id for token in own] == [token.id for token in other]
        assert [token.logprob for token in own] == pytest.approx([token.logprob for token in other])
        assert [len(token.top_logprobs) for token in own] == [len(token.top_logprobs) for token in other]


def measurements(model: TimeViper, device: str) -> list[Tensor]:
    batch = BATCH.to(device)
    measured = observe(
        model,
        batch,
        [0, 4],
        lambda tokens, stream: [
            *pool_map(tokens, stream.token_kind_T, 4, normalise=True),
            *pool_map(tokens, equal_bins(stream.segments, 3), 3),
            *head_statistics(tokens),
        ],
    )
    run_block = cut_flow(model, Blocking(flow="v2i", scope="from_layer", layer=0))
    blocked, _ = model.target_log_probs(batch, run_block=run_block)
    return [tensor.cpu() for layer in measured.values() for tensor in layer] + [blocked.cpu()]


@pytest.mark.slow
def test_maps_and_blocked_flows() -> None:
    model = make_model().eval()
    expected = measurements(model, "cpu")
    torch.testing.assert_close(measurements(model.cuda(), "cuda"), expected)


def test_weights_are_read_onto_the_device(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    save_pretrained(make_model(dtype=torch.float32).cuda(), folder)
    model = from_pretrained(folder, dtype=torch.bfloat16, device="cuda")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cuda", torch.bfloat16)}
    other = model.with_transv(SMALL.transv[:1])
    assert {p.device.type for p in other.parameters()} == {"cuda"}
    expected = from_pretrained(folder)
    torch.testing.assert_close(model.lm_head.weight.float().cpu(), expected.lm_head.weight, rtol=1e-2, atol=1e-2)


def test_merged_tokens() -> None:
    x = torch.randn(3, 25, 32)
    torch.testing.assert_close(merge_tokens(x.cuda(), 4, num_heads=2).cpu(), merge_tokens(x, 4, num_heads=2))


def test_a_copy_to_the_host_is_complete_before_it_is_checked() -> None:
    back = BATCH.to("cuda").to("cpu")
    assert torch.equal(back.input_ids, BATCH.input_ids)
