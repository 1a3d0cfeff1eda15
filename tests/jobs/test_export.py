from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from reference.public_checkpoints import public_state_dict
from timeviper_model.config import TINY
from timeviper_model.weights.families import text_config_to_dict
from timeviper_model.weights.weights_folder import from_pretrained, load_tokenizer
from timeviper_platform.data.synthetic.tokenizer import save_tokenizer

ROOT = Path(__file__).parents[2]


def export(*arguments: str) -> int:
    return int(runpy.run_path(str(ROOT / "jobs" / "export.py"))["main"](list(arguments)))


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_public_checkpoint_becomes_a_weights_folder(tmp_path: Path, as_folder: bool) -> None:
    own, public = public_state_dict(TINY, seed=0)
    folder, output = tmp_path / "checkpoint-final", tmp_path / "weights"
    folder.mkdir()
    torch.save(public, folder / "pytorch_model.bin")
    save_tokenizer(["a red square moves"], TINY.text.vocab_size, folder if as_folder else tmp_path / "tokenizer")
    if as_folder:
        (folder / "config.json").write_text(json.dumps(text_config_to_dict(TINY.text)))
        source = ["--from-public", str(folder), "--preset", "tiny"]
    else:
        source = ["--from-public", str(folder / "pytorch_model.bin"), "--preset", "tiny"]
        source += ["--tokenizer", str(tmp_path / "tokenizer")]
    assert export(*source, "--output", str(output)) == 0
    model = from_pretrained(output)
    assert model.config == TINY
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    assert load_tokenizer(output)("red")["input_ids"]
    metadata = json.loads((output / "config.json").read_text())["timeviper_metadata"]
    name = "checkpoint-final" if as_folder else "pytorch_model.bin"
    assert metadata == {"public_checkpoint": name, "time_text": "temporal"}


def test_a_public_checkpoint_needs_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("--from-public", "public.bin", "--output", str(tmp_path)) == 2
    assert "--from-public needs --preset" in capsys.readouterr().err


def test_a_missing_public_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(["a red square moves"], TINY.text.vocab_size, tmp_path)
    source = ("--from-public", str(tmp_path / "none.bin"), "--preset", "tiny", "--tokenizer", str(tmp_path))
    assert export(*source, "--output", str(tmp_path / "weights")) == 1
    assert capsys.readouterr().err.strip().endswith(f"{tmp_path / 'none.bin'} does not exist")
