"""Checkpoints that would run code when unpickled are rejected wherever they are read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.training_corpus import make_corpus, train_values
from timeviper_model.config import PRESETS
from timeviper_platform.common.config import parse_config
from timeviper_platform.training.checkpoint.commit import (
    DamagedCheckpointError,
    read_commit,
    write_commit,
    write_hashed,
)
from timeviper_platform.training.checkpoint.deepspeed_files import load_saved, num_tensor_bytes
from timeviper_platform.training.checkpoint.export import export_newest, export_weights, num_parameters
from timeviper_platform.training.checkpoint.local_files import open_for_resume
from timeviper_platform.training.checkpoint.manager import Checkpoints, is_committed
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.cost.memory import ModelSizes
from timeviper_platform.training.cost.node import checkpoint_bytes
from timeviper_platform.training.local import train_local
from timeviper_platform.training.metrics.writer import read_metrics
from timeviper_platform.training.optim.deepspeed_engine import import_deepspeed
from timeviper_platform.training.run import RunFolder


class Touch:
    """Unpickling it creates the folder `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.mkdir, (str(self._path), 0o700)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_that_would_run_code_is_rejected_and_runs_nothing(tmp_path: Path, mmap: bool) -> None:
    file, mark = tmp_path / "bad_states.pt", tmp_path / "ran"
    torch.save({"module": {"weight": torch.zeros(3)}, "epoch": Touch(mark)}, file)
    with pytest.raises(RuntimeError, match=r"bad_states.pt names posix.mkdir, .* might run code.*another checkpoint"):
        load_saved(file, mmap=mmap)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()  # the file would have run it


class PickledGetattr:
    """Unpickles through getattr, as an enum member does in the first releases of Python 3.11."""

    def __init__(self, of: Any, name: str) -> None:
        self._of, self._name = of, name

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, str]]:
        return getattr, (self._of, self._name)


def test_getattr_is_allowed_for_a_zero_stage_alone(tmp_path: Path) -> None:
    import_deepspeed()
    from deepspeed.runtime.zero.config import ZeroStageEnum

    file = tmp_path / "a_states.pt"
    torch.save({"zero_stage": PickledGetattr(ZeroStageEnum, "gradients")}, file)
    assert load_saved(file, mmap=True) == {"zero_stage": ZeroStageEnum.gradients}
    for of, name in ((ZeroStageEnum, "__reduce_ex__"), (torch.Size, "numel")):
        torch.save({"zero_stage": PickledGetattr(of, name)}, file)
        with pytest.raises(RuntimeError, match=r"names getattr, .* might run code"):
            load_saved(file, mmap=True)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration of three steps with a checkpoint after each."""
    values = train_values(make_corpus(tmp_path_factory.mktemp("corpus")), checkpoint={"every_steps": 1, "keep": 3})
    del values["phases"]["instruct"]
    return values


def trained(values: dict[str, Any], name: str, **changes: Any) -> TrainConfig:
    config = parse_config(TrainConfig, values | {"name": name} | changes)
    train_local(config)
    return config


@pytest.fixture(scope="module")
def finished(values: dict[str, Any], group_of_one: None) -> TrainConfig:
    """A finished run under ZeRO-2."""
    return trained(values, "finished", zero={"stage": 2})


def before_its_last_step(finished: TrainConfig, name: str) -> Path:
    """Copies the run by hard links, without its last checkpoint and weights; returns the copy's newest checkpoint."""
    run = Path(RunFolder.of(finished).uri)
    target = run.parent / name
    shutil.copytree(run, target, copy_function=os.link)
    shutil.rmtree(target / "weights")
    *_, newest, last = sorted((target / "checkpoints").glob("step-*"))
    shutil.rmtree(last)
    return newest


def poison(checkpoint: Path, pattern: str, mark: Path) -> None:
    """Makes the files of that pattern run code and updates COMMIT to match."""
    files = read_commit(str(checkpoint))
    for file in checkpoint.glob(pattern):
        content = torch.load(file, weights_only=False)
        files[file.name] = write_hashed(str(file), partial(torch.save, content | {"epoch": Touch(mark)}))
    write_commit(str(checkpoint), files)


@pytest.mark.parametrize("pattern", ["*model_states.pt", "*optim_states.pt"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_neither_resumes_from_nor_exports_a_checkpoint_that_would_run_code(
    values: dict[str, Any], finished: TrainConfig, tmp_path: Path, pattern: str, stage: int
) -> None:
    name, mark = f"poisoned-{stage}-{pattern.strip('*')}", tmp_path / "ran"
    checkpoint = before_its_last_step(finished, name)
    poison(checkpoint, pattern, mark)
    assert is_committed(str(checkpoint))
    with pytest.raises(RuntimeError, match="might run code"):
        trained(values, name, zero={"stage": stage})
    with pytest.raises(RuntimeError, match="might run code"):
        export_weights(str(checkpoint), str(tmp_path / "weights"))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        pytest.param(0, "float32", marks=pytest.mark.slow),
        pytest.param(0, "bfloat16", marks=pytest.mark.slow),
        pytest.param(1, "bfloat16", marks=pytest.mark.slow),
        pytest.param(2, "bfloat16", marks=pytest.mark.slow),
        (3, "bfloat16"),
    ],
)
def test_every_stage_and_dtype_saves_plain_data(
    values: dict[str, Any], group_of_one: None, stage: int, dtype: str
) -> None:
    changes = {"zero": {"stage": stage}, "dtype": dtype}
    whole = trained(values, f"{stage}-{dtype}", **changes)
    newest = before_its_last_step(whole, f"{stage}-{dtype}-again")
    saved = [load_saved(file, mmap=True) for file in newest.glob("*_states.pt")]
    groups = json.loads((newest / "groups.json").read_text())
    sizes = ModelSizes(num_parameters(PRESETS["tiny"]), sum(group["num_parameters"] for group in groups))
    expected_bytes = checkpoint_bytes(sizes, zero_stage=stage, world_size=1, dtype=whole.dtype).of_node(1)
    assert sum(map(num_tensor_bytes, saved)) == pytest.approx(expected_bytes, rel=0.01)
    resumed = trained(values, f"{stage}-{dtype}-again", **changes)
    rows, expected = (read_metrics(RunFolder.of(config).uri) for config in (resumed, whole))
    assert [row["attempt"] for row in rows] == [1, 1, 2]
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # a hard link
    file.write_bytes(content)


def test_one_flipped_bit_in_any_file_is_found_and_an_older_checkpoint_taken(
    finished: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    names = sorted(file.name for file in before_its_last_step(finished, "found").iterdir())
    assert len(names) == 7
    for number, name in enumerate(names):
        newest = before_its_last_step(finished, f"found-{number}")
        flip_a_bit(newest / name)
        caplog.clear()
        checkpoints = Checkpoints(str(newest.parent))
        uris = lambda checkpoints=checkpoints: list(reversed(checkpoints.committed()))  # noqa: E731
        opened = open_for_resume(uris, zero_stage=2, dtype="float32")
        assert Path(opened.uri).name == "step-00000001", name
        if name != "COMMIT":
            assert f"{newest}: {name}" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_one_flipped_bit_in_any_file_resumes_from_an_older_checkpoint_and_names_the_file(
    values: dict[str, Any], finished: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, stage: int
) -> None:
    """Today's readers load a changed weight without a word."""
    changes = {"zero": {"stage": stage}}
    whole = finished if stage == 2 else trained(values, "whole-3", **changes)
    expected = [row["loss"] for row in read_metrics(RunFolder.of(whole).uri)]
    names = sorted(file.name for file in before_its_last_step(whole, f"files-{stage}").iterdir())
    assert len(names) == 7
    for number, name in enumerate(names):
        run = f"flipped-{stage}-{number}"
        newest = before_its_last_step(whole, run)
        flip_a_bit(newest / name)
        caplog.clear()
        config = trained(values, run, **changes)
        rows = read_metrics(RunFolder.of(config).uri)
        assert [row["attempt"] for row in rows] == [1, 2, 2], name
        assert [row["loss"] for row in rows] == expected, name
        assert f"{newest}: {name}" in caplog.text
        assert not (newest / "COMMIT.damaged").exists()  # written again by the resumed run


def test_export_takes_the_newest_intact_checkpoint(
    values: dict[str, Any], finished: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = before_its_last_step(finished, "export-damaged")
    file = next(newest.glob("*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    exported = export_newest(str(newest.parent), str(tmp_path / "weights"))
    assert exported.endswith("step-00000001")
    assert f"{newest}: {file.name} (its checksum differs)" in caplog.text
    with pytest.raises(DamagedCheckpointError, match=file.name):
        export_weights(str(newest), str(tmp_path / "other"))
