"""Our backbone equals transformers' NemotronH on the same weights, from a folder in NVIDIA's layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from reference.small_models import SMALL, first_tokens, make_model, make_sample
from timeviper_model.batching.batch import pack_samples
from timeviper_model.inference.prefill import prefill
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import config_to_dict, load_backbone


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvidia")
    source = make_model(seed=5, dtype=torch.float32)
    tensors = {n: t for n, t in source.state_dict().items() if n.startswith(("backbone.", "lm_head"))}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = config_to_dict(SMALL)["text_config"] | {"time_step_limit": [0.0, float("inf")]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def oracle(llm_folder: Path) -> Any:
    from transformers import NemotronHForCausalLM

    model, report = NemotronHForCausalLM.from_pretrained(llm_folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))  # transformers 5.23 clamps to (time_step_min, inf)
    return model.eval()


@pytest.fixture
def ours(llm_folder: Path) -> TimeViper:
    model = make_model(replace(SMALL, transv=()), seed=1, dtype=torch.float32)
    load_backbone(model, llm_folder)
    return model


@pytest.mark.parametrize("length", [1, 7, 8, 61])
def test_logits_equal_those_of_transformers(length: int, ours: TimeViper, oracle: Any) -> None:
    sample = make_sample("i" * length, seed=length)
    with torch.no_grad():
        expected = oracle(input_ids=torch.tensor([sample.input_ids])).logits[0]
    assert expected.std() > 0.3, "a model that says nothing would pass any comparison"
    cache = ours.new_cache(1, device="cpu", dtype=torch.float32)
    for index in {0, length // 2, length - 1}:
        logits = prefill(ours, pack_samples([first_tokens(sample, index + 1)], [torch.zeros(0, 12)]), cache, 0)
        torch.testing.assert_close(logits, expected[index], rtol=1e-4, atol=1e-4)


def test_generation_with_caches_equals_transformers(ours: TimeViper, oracle: Any) -> None:
    sample = make_sample("i" * 19)
    ids = torch.tensor([sample.input_ids])
    with torch.no_grad():  # explicit mask: one derived from ids would hide tokens equal to the pad id
        expected = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
    cache = ours.new_cache(1, device="cpu", dtype=torch.float32)
    token = int(prefill(ours, pack_samples([sample], [torch.zeros(0, 12)]), cache, 0).argmax())
    tokens = [token]
    for _ in range(11):
        tokens.append(int(ours.decode_step(torch.tensor([tokens[-1]]), cache, torch.tensor([0])).argmax()))
    assert tokens == expected[0, 19:].tolist()


def test_every_gradient_equals_that_of_transformers(ours: TimeViper, oracle: Any) -> None:
    sample = make_sample("i" + "r" * 40)
    ids = torch.tensor([sample.input_ids])
    out = ours(pack_samples([sample], [torch.zeros(0, 12)]))
    loss = out.loss_sum / out.num_targets
    loss.backward()
    oracle.zero_grad()
    expected = torch.nn.functional.cross_entropy(oracle(input_ids=ids).logits[0, :-1], ids[0, 1:])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    found = dict(ours.named_parameters())
    for name, parameter in oracle.named_parameters():
        grad = found[name.replace("model.", "backbone.", 1)].grad
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
