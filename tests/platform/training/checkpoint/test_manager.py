from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reference.hiccups import HiccupFileSystem
from timeviper_platform.common import storage
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.checkpoint.commit import (
    COMMIT_FILE,
    DamagedCheckpointError,
    write_commit,
    write_hashed,
)
from timeviper_platform.training.checkpoint.local_files import open_checkpoint
from timeviper_platform.training.checkpoint.manager import Checkpoints, is_committed, read_state, resolve_resume
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
    documents: dict[str, Any] = {"state.json": state_of(step).to_json(), "groups.json": [], "model.json": {}}
    contents = {"rank_states.pt": b"12345"} | {name: json.dumps(value).encode() for name, value in documents.items()}
    files = {
        name: write_hashed(storage.join_uri(uri, name), lambda file, data=data: file.write(data))
        for name, data in contents.items()
    }
    if commit:
        write_commit(uri, files)
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
    with open_checkpoint(newest) as opened:
        assert (opened.folder / "rank_states.pt").read_bytes() == b"12345"
        assert opened.state == state_of(10)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_storage_that_does_not_answer_is_not_a_run_without_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    monkeypatch.setenv(storage.FIRST_WAIT_VARIABLE, "0")
    make_checkpoint(str(tmp_path / "checkpoints"), 2)
    monkeypatch.setattr(HiccupFileSystem, "broken", {"/checkpoints"})
    with pytest.raises(storage.StorageUnavailableError, match="hiccups"):
        resolve_resume(f"hiccup://{tmp_path}/checkpoints", resume)


def test_a_checkpoint_with_a_short_or_missing_file_is_skipped(tmp_path: Path) -> None:
    good = make_checkpoint(str(tmp_path), 2)
    short, missing = make_checkpoint(str(tmp_path), 4), make_checkpoint(str(tmp_path), 6)
    Path(short, "rank_states.pt").write_bytes(b"123")
    Path(missing, "rank_states.pt").unlink()
    assert not is_committed(short)
    assert Checkpoints(str(tmp_path)).newest() == good
    with pytest.raises(DamagedCheckpointError, match=r"step-00000006: rank_states.pt \(missing\)"):
        read_state(missing)


@pytest.mark.parametrize("name", ["rank_states.pt", "state.json", "groups.json", "model.json", COMMIT_FILE])
def test_any_flipped_bit_is_found_and_its_file_named(tmp_path: Path, name: str) -> None:
    uri = make_checkpoint(str(tmp_path), 4)
    whole = Path(uri, name).read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        Path(uri, name).write_bytes(flipped)
        with pytest.raises(DamagedCheckpointError, match=rf"step-00000004: {name} \(its checksum|{name} is damaged"):
            with open_checkpoint(uri):
                pass


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again_from_scratch(tmp_path: Path) -> None:
    Path(make_checkpoint(str(tmp_path), 2), COMMIT_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged .*step-00000002.*choose another name"):
        resolve_resume(str(tmp_path), "auto")


def test_a_checkpoint_of_another_version_is_refused_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timeviper_platform.training.checkpoint.state.STATE_VERSION", 2)
    uri = make_checkpoint(str(tmp_path), 2)
    monkeypatch.undo()
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


def test_resuming_an_older_checkpoint_sets_the_newer_ones_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a restart would continue from the newer ones."""
    older, newer = make_checkpoint(str(tmp_path), 2), make_checkpoint(str(tmp_path), 4)
    assert resolve_resume(str(tmp_path), older) == older
    assert resolve_resume(str(tmp_path), "auto") == older
    assert f"{newer} is set aside; to use it again, rename {newer}/COMMIT.superseded to COMMIT" in caplog.text
    Path(newer, "COMMIT.superseded").rename(Path(newer, COMMIT_FILE))
    assert resolve_resume(str(tmp_path), "auto") == newer
