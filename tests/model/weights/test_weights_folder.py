from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from reference.engine_requests import TOKENIZER
from reference.small_models import SMALL, make_model, make_sample, pack
from timeviper_model.config import PRESETS
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights import weights_folder as weights
from timeviper_model.weights.weights_folder import (
    config_from_dict,
    config_to_dict,
    from_pretrained,
    load_backbone,
    load_text_config,
    load_tokenizer,
    save_pretrained,
    weights_hash,
)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_model_comes_back_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    config = replace(SMALL, text=replace(SMALL.text, tie_word_embeddings=tied))
    model = make_model(config, dtype=torch.float32)
    save_pretrained(model, tmp_path / "weights", max_shard_bytes=20_000, metadata={"step": "7"})
    loaded = from_pretrained(tmp_path / "weights")
    assert loaded.config == config
    assert not loaded.training
    expected = model.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert (loaded.lm_head.weight is loaded.backbone.embeddings.weight) is tied
    batch = pack([make_sample("svvvviirr")], dtype=torch.float32)
    assert torch.equal(loaded(batch).loss_sum, model(batch).loss_sum)


def test_shards_are_bounded_and_the_index_names_each_tensor(tmp_path: Path) -> None:
    model = make_model(dtype=torch.float32)
    save_pretrained(model, tmp_path / "weights", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "weights" / weights.INDEX_NAME).read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    shards = {name: load_file(tmp_path / "weights" / name) for name in set(index["weight_map"].values())}
    assert len(shards) > 2
    for name, shard in shards.items():
        assert sum(tensor.nbytes for tensor in shard.values()) <= 20_000
        assert all(index["weight_map"][tensor] == name for tensor in shard)


def test_config_file_has_the_keys_of_nemotron_and_the_sites_spelled_out(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path / "weights")
    config = json.loads((tmp_path / "weights" / "config.json").read_text())
    assert config["model_type"] == "timeviper"
    assert config["text_config"]["hybrid_override_pattern"] == "M-*M*-"
    assert config["text_config"]["model_type"] == "nemotron_h"
    assert config["transv"][0] == {
        "layer": 1,
        "select": "uniform",
        "keep": 0.5,
        "transfer": "cross_attention",
        "transfer_from": "dropped",
    }


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_their_config_file(name: str) -> None:
    assert config_from_dict(json.loads(json.dumps(config_to_dict(PRESETS[name])))) == PRESETS[name]


def test_dtype_is_chosen_at_loading(tmp_path: Path) -> None:
    save_pretrained(make_model(dtype=torch.float32), tmp_path / "weights")
    loaded = from_pretrained(tmp_path / "weights", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_every_mismatched_tensor_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    save_pretrained(make_model(dtype=torch.float32), folder)
    shard = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    del tensors["transv.1.alpha"], tensors["backbone.layers.3.mixer.A_log"]
    tensors["projector.fc3.bias"] = torch.zeros(2)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :5].contiguous()
    save_file(tensors, shard)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        from_pretrained(folder)
    message = str(caught.value)
    assert "missing: backbone.layers.3.mixer.A_log, transv.1.alpha" in message
    assert "unexpected: projector.fc3.bias" in message
    assert "misshaped: lm_head.weight is (40, 5), should be (40, 24)" in message


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        from_pretrained(tmp_path)
    broken = config_to_dict(SMALL)
    broken["text_config"]["vocab_size"] = "many"
    (tmp_path / "config.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="vocab_size"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(SMALL)))
    with pytest.raises(ValueError, match=r"has no \.safetensors"):
        from_pretrained(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path / "weights", max_shard_bytes=20_000)
    (tmp_path / "weights" / "model-00001-of-00009.safetensors").unlink(missing_ok=True)
    first = sorted((tmp_path / "weights").glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ValueError, match=first.name):
        from_pretrained(tmp_path / "weights")


def test_a_save_that_fails_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "weights"
    save_pretrained(make_model(seed=1), folder)
    before = weights_hash(folder)

    class FullDisk:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save_pretrained(make_model(seed=2), folder, tokenizer=FullDisk())
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert weights_hash(folder) == before


@pytest.mark.parametrize("name", ["a file", "other files", "weights and a folder", "another model"])
def test_nothing_but_a_weights_folder_is_replaced(tmp_path: Path, name: str) -> None:
    """A save to a home or a run's folder deleted it."""
    target = tmp_path / "target"
    if name == "a file":
        target.write_text("kept")
    else:
        target.mkdir()
        save_pretrained(make_model(), target)
        if name == "weights and a folder":
            (target / "results").mkdir()
        elif name == "another model":
            (target / "config.json").write_text('{"model_type": "qwen2"}')
        else:
            (target / "config.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="target exists and is no weights folder, and would be deleted; name another"):
        save_pretrained(make_model(), target)
    assert sorted(tmp_path.rglob("*")) == before


def test_equal_weights_have_equal_hashes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        save_pretrained(make_model(seed=seed), tmp_path / name)
    a, b, c = (weights_hash(tmp_path / name) for name in "abc")
    assert a == b != c


NVIDIA_VALUES = {"eos_token_id": [12, 11], "time_step_limit": [0.0, float("inf")]}
"""Lists and Infinity, as in real configurations."""


def write_backbone(folder: Path, prefix: str, extra: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    source = make_model(seed=9, dtype=torch.float32)
    tensors = {
        name.replace("backbone.", prefix): tensor
        for name, tensor in source.state_dict().items()
        if name.startswith(("backbone.", "lm_head"))
    }
    folder.mkdir()
    save_file(tensors | (extra or {}), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_to_dict(SMALL)["text_config"] | NVIDIA_VALUES))
    return dict(source.state_dict())


@pytest.mark.parametrize("prefix", ["backbone.", "model."])
def test_backbone_is_read_in_either_layout_and_transv_becomes_its_copy(tmp_path: Path, prefix: str) -> None:
    expected = write_backbone(tmp_path / "llm", prefix, {"mtp.layers.0.weight": torch.zeros(2)})
    model = make_model(seed=1, dtype=torch.float32)
    projector = model.projector.fc1.weight.clone()
    load_backbone(model, tmp_path / "llm")
    loaded = model.state_dict()
    names = [name for name in expected if name.startswith(("backbone.", "lm_head"))]
    assert all(torch.equal(loaded[name], expected[name]) for name in names)
    assert torch.equal(loaded["transv.1.q_proj.weight"], expected["backbone.layers.2.mixer.q_proj.weight"])
    assert torch.equal(model.projector.fc1.weight, projector)
    assert load_text_config(tmp_path / "llm") == replace(SMALL.text, eos_token_id=(12, 11))


def test_backbone_of_other_sizes_is_refused_by_name(tmp_path: Path) -> None:
    write_backbone(tmp_path / "llm", "backbone.")
    other = make_model(replace(SMALL, text=replace(SMALL.text, intermediate_size=48)), dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"misshaped: backbone\.layers\.1\.mixer\.\w+_proj\.weight is"):
        load_backbone(other, tmp_path / "llm")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_transformers_reads_the_language_models_own_sizes(tmp_path: Path) -> None:
    from transformers import NemotronHConfig

    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(SMALL)["text_config"]))
    config = NemotronHConfig.from_pretrained(tmp_path)
    assert tuple(config.time_step_limit) == (0.0, float("inf"))
    assert (config.hidden_size, config.ssm_state_size) == (SMALL.text.hidden_size, SMALL.text.ssm_state_size)


def test_a_backbone_with_other_settings_is_refused(tmp_path: Path) -> None:
    write_backbone(tmp_path / "llm", "backbone.")
    text = replace(SMALL.text, layer_norm_epsilon=1e-3, num_attention_heads=1, head_dim=32, num_key_value_heads=1)
    other = make_model(replace(SMALL, text=text), dtype=torch.float32)
    before = other.state_dict()["lm_head.weight"].clone()
    message = (
        r"config\.json: num_attention_heads = \d+, the model's is 1; .*layer_norm_epsilon = 1e-05, the model's is 0.001"
    )
    with pytest.raises(ValueError, match=message):
        load_backbone(other, tmp_path / "llm")
    assert torch.equal(other.state_dict()["lm_head.weight"], before)


def test_a_folder_that_transformers_saved_is_read(tmp_path: Path) -> None:
    from transformers import NemotronHForCausalLM

    expected = write_backbone(tmp_path / "llm", "backbone.")
    NemotronHForCausalLM.from_pretrained(tmp_path / "llm").save_pretrained(tmp_path / "native")
    assert load_text_config(tmp_path / "native") == replace(SMALL.text, eos_token_id=(12, 11))
    model = make_model(seed=1, dtype=torch.float32)
    load_backbone(model, tmp_path / "native")
    names = [name for name in expected if name.startswith(("backbone.", "lm_head"))]
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in names)


def test_expert_layers_are_a_clear_error(tmp_path: Path) -> None:
    write_backbone(tmp_path / "llm", "model.", {"model.layers.1.mixer.experts.0.up_proj.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="has expert layers, which are not supported"):
        load_backbone(make_model(dtype=torch.float32), tmp_path / "llm")
    raw = json.loads((tmp_path / "llm" / "config.json").read_text())
    for changes in (
        {"hybrid_override_pattern": "ME*M*-"},
        {"hybrid_override_pattern": None, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    ):
        (tmp_path / "llm" / "config.json").write_text(json.dumps(raw | changes))
        with pytest.raises(ValueError, match=r"expert blocks \(E\) are not supported"):
            load_text_config(tmp_path / "llm")


LOAD_AND_MEASURE = """
import sys, torch
from timeviper_model.config import HybridConfig
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import from_pretrained, load_config
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
with torch.device("meta"):
    TimeViper(load_config(sys.argv[1]))  # imports and one-time set-up are not measured
before = status("VmRSS")
model = from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
def test_loading_holds_the_weights_and_one_shard_at_a_time(tmp_path: Path) -> None:
    text = replace(SMALL.text, hybrid_override_pattern="-" * 12, hidden_size=512, intermediate_size=2048)
    model = TimeViper(replace(SMALL, text=text, transv=()))
    shard_bytes, slack_bytes = 17 * 2**20, 6 * 2**20
    save_pretrained(model, tmp_path / "weights", max_shard_bytes=shard_bytes)
    assert len(list((tmp_path / "weights").glob("*.safetensors"))) >= 6
    command = [sys.executable, "-c", LOAD_AND_MEASURE, str(tmp_path / "weights")]
    held, weights_bytes = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
    assert weights_bytes > 2 * (shard_bytes + slack_bytes)  # otherwise reading all files at once would pass too
    assert held <= weights_bytes + shard_bytes + slack_bytes


def test_tokenizer_is_saved_with_the_weights(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path / "weights", tokenizer=TOKENIZER)
    assert load_tokenizer(tmp_path / "weights")("b a")["input_ids"] == TOKENIZER("b a")["input_ids"]


def test_a_tokenizer_without_the_templates_tokens_is_not_exported(tmp_path: Path) -> None:
    bare = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>")
    with pytest.raises(ValueError, match="the tokenizer does not know <SPECIAL_10>"):
        save_pretrained(make_model(), tmp_path / "weights", tokenizer=tokenizer)
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no tokenizer that transformers reads"),
        (b"", r"tokenizer\.json is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"tokenizer\.json is a Git LFS pointer"),
        (b"{}", "holds no tokenizer that transformers reads"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused_in_one_line(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
