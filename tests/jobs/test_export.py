from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from reference.public_checkpoints import public_state_dict
from timeviper_model.config import TINY
from timeviper_model.weights.weights_folder import from_pretrained, load_tokenizer
from timeviper_platform.data.synthetic.tokenizer import save_tokenizer

ROOT = Path(__file__).parents[2]


def export(*arguments: str) -> int:
    return int(runpy.run_path(str(ROOT / "jobs" / "export.py"))["main"](list(arguments)))


def test_a_public_checkpoint_becomes_a_weights_folder(tmp_path: Path) -> None:
    own, public = public_state_dict(TINY, seed=0)
    checkpoint, output = tmp_path / "public.bin", tmp_path / "weights"
    torch.save(public, checkpoint)
    save_tokenizer(["a red square moves"], TINY.text.vocab_size, tmp_path / "tokenizer")
    source = ("--public-checkpoint", str(checkpoint), "--preset", "tiny", "--tokenizer", str(tmp_path / "tokenizer"))
    assert export(*source, "--output", str(output)) == 0
    model = from_pretrained(output)
    assert model.config == TINY
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    assert load_tokenizer(output)("red")["input_ids"]
    metadata = json.loads((output / "config.json").read_text())["timeviper_metadata"]
    assert metadata == {"public_checkpoint": str(checkpoint), "time_text": "temporal"}


def test_a_public_checkpoint_needs_a_preset_and_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("--public-checkpoint", "public.bin", "--output", str(tmp_path)) == 2
    assert "--public-checkpoint, --preset and --tokenizer go together" in capsys.readouterr().err
