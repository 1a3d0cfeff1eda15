"""Published language models, shrunk with every key of their config.json kept, equal transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from timeviper_model.batching.batch import IGNORE_INDEX, Sample, TokenKind, pack_samples
from timeviper_model.config import with_text
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import load_backbone, load_text_config

CONFIGS = Path(__file__).parents[2] / "reference" / "cases" / "configs"
VOCAB_SIZE, LENGTH = 64, 40

NEMOTRON = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 6,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "vocab_size": VOCAB_SIZE,
}
QWEN = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": VOCAB_SIZE,
}

LOADED = (
    "nemotron-h-4b",
    "nemotron-h-8b",
    "nemotron-nano-12b-v2",
    "nemotron-nano-9b-v2",
    "nemotron3-nano-4b",
    "qwen2-7b-instruct",
    "qwen2.5-0.5b",
    "qwen2.5-72b",
    "qwen2.5-7b-instruct",
    "qwen2.5-7b-swift-resaved",
    "qwen2.5-7b-yarn",
)
REFUSED = {
    "nemotron3-nano-30b": r"expert blocks \(E\) are not supported",
    "qwen2.5-7b-bnb": r"quantised \(quant_method 'gptq'\)",
    "qwen3-0.6b": "model_type is 'qwen3'; supported are nemotron_h and qwen2",
}


def shrunk(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    if values["model_type"] == "nemotron_h":
        pattern = values["hybrid_override_pattern"]
        pattern = pattern[: pattern.index("*") + 2]
        head = {key: 8 for key in ("head_dim", "attention_head_dim") if key in values}
        return values | NEMOTRON | head | {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    values |= QWEN | ({"pad_token_id": 0} if "pad_token_id" in values else {})
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    if values.get("rope_scaling"):  # LENGTH is past the original context, where YaRN matters
        values["rope_scaling"]["original_max_position_embeddings"] = LENGTH // 4
    return values


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = json.loads((folder / "config.json").read_text())
    config = CONFIG_MAPPING[raw["model_type"]].from_pretrained(folder)
    if "attention_head_dim" in raw:  # transformers reads its default of 128, which is the published width
        config.head_dim = raw["attention_head_dim"]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # initial biases of 0 and norms of 1 would hide a missing one
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in key else 0.0, std=0.3)
            elif "conv1d" not in key:
                torch.nn.init.normal_(parameter, std=0.15)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))  # transformers 5.23 clamps to (time_step_min, inf)
    return model


def save_as_published(model: Any, folder: Path, *, stores_tied_head: bool = False) -> None:
    """Saves under NVIDIA's names (backbone.*) or Qwen's (model.*)."""
    is_nvidias = model.config.model_type == "nemotron_h"
    tensors = {
        f"backbone.{name.removeprefix('model.')}" if is_nvidias and name.startswith("model.") else name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if stores_tied_head or not (model.config.tie_word_embeddings and name == "lm_head.weight")
    }
    save_file(tensors, folder / "model.safetensors")


def our_logits(model: TimeViper, ids: list[int]) -> Tensor:
    sample = Sample(
        input_ids=ids,
        vision_index=[-1] * len(ids),
        token_kind=[int(TokenKind.SYSTEM)] * len(ids),
        labels=[IGNORE_INDEX] * len(ids),
    )
    batch = pack_samples([sample], [torch.zeros(0, model.config.vision.row_size)])
    with torch.no_grad():
        stream, _ = model.run_blocks(model.embed(batch))
        return model.logits(stream.hidden_TD)


@pytest.mark.parametrize("name", LOADED)
def test_a_published_model_gives_the_logits_of_transformers(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shrunk(name)))
    oracle = transformers_model(tmp_path)
    save_as_published(oracle, tmp_path)
    model = TimeViper(with_text(load_text_config(tmp_path)))
    load_backbone(model, tmp_path)
    ids = torch.randint(0, VOCAB_SIZE, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        expected = oracle(input_ids=torch.tensor([ids])).logits[0]
    assert expected.std() > 0.1, "a model that says nothing would pass any comparison"
    torch.testing.assert_close(our_logits(model, ids), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("name", "message"), REFUSED.items())
def test_a_model_of_another_kind_is_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
    with pytest.raises(ValueError, match=message) as caught:
        load_text_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("nemotron-nano-9b-v2", {"residual_in_fp32": True}, "residual_in_fp32 = True is not supported"),
        ("nemotron-nano-9b-v2", {"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ("nemotron-nano-9b-v2", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("qwen2.5-7b-instruct", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window = True"),
        ("qwen2.5-7b-instruct", {"use_mrope": True}, "use_mrope = True is not supported"),
        ("qwen2.5-7b-yarn", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE of type 'linear'"),
        ("qwen2.5-7b-yarn", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ("qwen2.5-7b-yarn", {"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor = 0.5"),
        ("qwen2.5-7b-instruct", {"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8'"),
    ],
)
def test_a_key_that_changes_the_computation_is_refused(
    tmp_path: Path, name: str, values: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shrunk(name) | values))
    with pytest.raises(ValueError, match=message):
        load_text_config(tmp_path)


def test_a_sliding_window_of_no_layer_is_none(tmp_path: Path) -> None:
    values = shrunk("qwen2.5-7b-instruct") | {"use_sliding_window": True, "max_window_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert not load_text_config(tmp_path).use_sliding_window  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tied")
    (folder / "config.json").write_text(json.dumps(shrunk("qwen2.5-0.5b")))
    oracle = transformers_model(folder)
    save_as_published(oracle, folder, stores_tied_head=True)
    return folder, oracle


def damaged_copy(source: Path, target: Path, **tensors: Tensor) -> Path:
    from safetensors.torch import load_file

    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file(load_file(source / "model.safetensors") | tensors, target / "model.safetensors")
    return target


def test_a_tied_matrix_may_be_stored_if_it_is_equal(tied: tuple[Path, Any], tmp_path: Path) -> None:
    folder, oracle = tied
    model = TimeViper(with_text(load_text_config(folder)))
    load_backbone(model, folder)
    assert torch.equal(model.lm_head.weight, oracle.model.embed_tokens.weight)
    other = damaged_copy(folder, tmp_path / "other", **{"lm_head.weight": torch.ones(VOCAB_SIZE, QWEN["hidden_size"])})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embeddings; set tie_word_embeddings to"):
        load_backbone(model, other)


def test_buffers_of_old_transformers_are_passed_over(tied: tuple[Path, Any], tmp_path: Path) -> None:
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(6) for layer in range(3)}
    folder = damaged_copy(tied[0], tmp_path / "old", **buffers)
    load_backbone(TimeViper(with_text(load_text_config(folder))), folder)


def test_a_whole_file_is_taken_beside_a_stale_index_and_an_adapter(tied: tuple[Path, Any], tmp_path: Path) -> None:
    folder = damaged_copy(tied[0], tmp_path / "whole")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-00001.safetensors"}}))
    save_file({"base.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    load_backbone(TimeViper(with_text(load_text_config(folder))), folder)


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickled_weights_are_read(tied: tuple[Path, Any], tmp_path: Path, is_zip: bool) -> None:
    folder, oracle = tied
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(oracle.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    model = TimeViper(with_text(load_text_config(tmp_path)))
    load_backbone(model, tmp_path)
    assert torch.equal(model.backbone.norm_f.weight, oracle.model.norm.weight)


@pytest.mark.parametrize(
    "tensors",
    [
        {"model.layers.0.mlp.up_proj.weight": torch.zeros(80, 48).to(torch.float8_e4m3fn)},
        {"model.layers.0.mlp.up_proj.weight": torch.zeros(80, 48, dtype=torch.int8)},
        {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)},
    ],
    ids=["float8", "int8", "scale"],
)
def test_quantised_tensors_are_refused_by_that_word(
    tied: tuple[Path, Any], tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    folder = damaged_copy(tied[0], tmp_path / "quantised", **tensors)
    with pytest.raises(ValueError, match="is of quantised weights; use the unquantised weights"):
        load_backbone(TimeViper(with_text(load_text_config(folder))), folder)
