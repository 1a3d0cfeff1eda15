from __future__ import annotations

from pathlib import Path

import pytest

from timeviper_platform.common import storage
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.checkpoint.manager import (
    COMMIT_FILE,
    Checkpoints,
    is_committed,
    local_copy,
    read_state,
    resolve_resume,
)
from timeviper_platform.training.checkpoint.state import StepPlan, TrainState
from timeviper_platform.training.optim.lr_schedule import ScheduleConfig


def state_of(step: int) -> TrainState:
    return TrainState(
        phase="align",
        step=step,
        global_step=step,
        position=PackPosition(1, 7),
        plan_hash="abc",
        step_plan=StepPlan(packs_per_step=3, num_steps=20, num_epochs=None, schedule=ScheduleConfig(warmup_ratio=0.1)),
        world_size=2,
        zero_stage=2,
        dtype="float32",
    )


def make_checkpoint(root: str, step: int, *, commit: bool = True) -> str:
    uri = storage.join_uri(root, f"step-{step:08d}")
    storage.write_bytes(storage.join_uri(uri, "shard.pt"), b"12345")
    storage.write_json(storage.join_uri(uri, "state.json"), state_of(step).to_json())
    if commit:
        size = len(storage.read_bytes(storage.join_uri(uri, "state.json")))
        storage.write_json(storage.join_uri(uri, COMMIT_FILE), {"files": {"shard.pt": 5, "state.json": size}})
    return uri


@pytest.mark.parametrize("remote", [False, True])
def test_the_newest_committed_checkpoint_counts(tmp_path: Path, remote: bool) -> None:
    root = f"memory://checkpoints-{tmp_path.name}" if remote else str(tmp_path)
    assert Checkpoints(root).newest() is None
    make_checkpoint(root, 2)
    newest = make_checkpoint(root, 10)
    make_checkpoint(root, 12, commit=False)  # killed while saving
    assert Checkpoints(root).newest() == newest
    assert resolve_resume(root, "auto") == newest
    assert read_state(newest) == state_of(10)
    with local_copy(newest) as folder:
        assert (folder / "shard.pt").read_bytes() == b"12345"


def test_a_checkpoint_with_a_short_or_missing_file_is_skipped(tmp_path: Path) -> None:
    good = make_checkpoint(str(tmp_path), 2)
    short, missing = make_checkpoint(str(tmp_path), 4), make_checkpoint(str(tmp_path), 6)
    Path(short, "shard.pt").write_bytes(b"123")
    Path(missing, "shard.pt").unlink()
    assert not is_committed(short)
    assert Checkpoints(str(tmp_path)).newest() == good
    with pytest.raises(ValueError, match=r"no committed checkpoint at .*step-00000006"):
        read_state(missing)


def test_a_checkpoint_of_another_version_is_refused_with_advice(tmp_path: Path) -> None:
    uri = make_checkpoint(str(tmp_path), 2)
    path = Path(uri, "state.json")
    path.write_text(path.read_text().replace('"version": 3', '"version": 2'))
    with pytest.raises(ValueError, match=r"step-00000002: state version 2, this release reads 3; .* exported weights"):
        read_state(uri)


def test_resuming_never_leaves_a_run_with_two_histories(tmp_path: Path) -> None:
    own, other = str(tmp_path / "own"), str(tmp_path / "other")
    elsewhere = make_checkpoint(other, 5)
    assert resolve_resume(own, "never") is None
    assert resolve_resume(own, elsewhere) == elsewhere
    newest = make_checkpoint(own, 3)
    assert resolve_resume(own, newest) == newest
    with pytest.raises(ValueError, match=r"--resume never, but .*step-00000003 is committed"):
        resolve_resume(own, "never")
    with pytest.raises(ValueError, match=r"this run's newest checkpoint is .*step-00000003"):
        resolve_resume(own, elsewhere)
    with pytest.raises(ValueError, match="no committed checkpoint at '/nowhere'"):
        resolve_resume(own, "/nowhere")
