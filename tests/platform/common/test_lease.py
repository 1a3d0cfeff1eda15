from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from timeviper_platform.common import lease, storage
from timeviper_platform.common.lease import LEASE_FILE, LeaseHeldError, hold_lease


def owner_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """Writes the lease of another owner: by default of a live process of this machine."""
    with hold_lease(str(folder), "training run other"):
        owner = json.loads((folder / LEASE_FILE).read_text())
    owner |= {"id": "other", **changes}
    (folder / LEASE_FILE).write_text(json.dumps(owner))
    return owner  # type: ignore[no-any-return]


@pytest.mark.parametrize("remote", [False, True])
def test_a_second_job_is_told_whose_the_folder_is(
    tmp_path: Path, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.0)
    folder = f"memory://leases-{tmp_path.name}" if remote else str(tmp_path)
    with hold_lease(folder, "training run demo"):
        owner = rf"training run demo of .* on .* \(process {os.getpid()}, since "
        message = rf"{folder} is in use by {owner}.*remove {folder}/LEASE"
        with pytest.raises(LeaseHeldError, match=message), hold_lease(folder, "jobs/preprocess.py"):
            pass
    with hold_lease(folder, "jobs/preprocess.py"):
        assert storage.exists(f"{folder}/{LEASE_FILE}")
    assert not storage.exists(f"{folder}/{LEASE_FILE}")


def hold_until_killed(folder: str, started: Any) -> None:
    with hold_lease(folder, "training run demo"):
        started.set()
        time.sleep(60)


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=hold_until_killed, args=(str(tmp_path), started))
    process.start()
    assert started.wait(30)
    with pytest.raises(LeaseHeldError), hold_lease(str(tmp_path), "training run demo"):
        pass
    os.kill(process.pid or 0, signal.SIGKILL)
    while lease._process_start(process.pid or 0) is not None:  # a zombie counts as ended
        time.sleep(0.01)
    with hold_lease(str(tmp_path), "training run demo"):
        pass
    process.join()


def test_a_lease_whose_release_failed_is_free_in_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(uri: str) -> None:
        raise OSError(f"{uri} cannot be removed")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", fail)
        with hold_lease(str(tmp_path), "training run demo"):
            pass
    assert (tmp_path / LEASE_FILE).exists()
    with hold_lease(str(tmp_path), "training run demo"):
        pass


def test_a_process_id_that_was_given_again_does_not_hold_the_lease(tmp_path: Path) -> None:
    owner_of(tmp_path, process_started=1)
    with hold_lease(str(tmp_path), "training run demo"):
        pass


def test_the_lease_of_another_machine_is_free_once_it_is_not_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "POLL_S", 0.01)
    monkeypatch.setattr(lease, "STALE_S", 0.2)
    owner = owner_of(tmp_path, machine="another", host="node-b")
    with hold_lease(str(tmp_path), "training run demo"):
        pass

    polls = iter([owner, owner | {"beat": 2}])  # its owner lives, whatever the clocks of both machines say
    (tmp_path / LEASE_FILE).write_text(json.dumps(owner))
    monkeypatch.setattr(
        lease.time, "sleep", lambda seconds: (tmp_path / LEASE_FILE).write_text(json.dumps(next(polls)))
    )
    with pytest.raises(LeaseHeldError, match="on node-b"), hold_lease(str(tmp_path), "training run demo"):
        pass


def test_an_owner_learns_that_its_lease_was_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    lost: list[bool] = []
    with hold_lease(str(tmp_path), "training run demo", on_lost=lambda: lost.append(True)):
        beat = json.loads((tmp_path / LEASE_FILE).read_text())["beat"]
        while json.loads((tmp_path / LEASE_FILE).read_text())["beat"] == beat:
            time.sleep(0.01)
        taken = json.loads((tmp_path / LEASE_FILE).read_text()) | {"id": "other", "job": "training run other"}
        deadline = time.monotonic() + 10
        while not lost and time.monotonic() < deadline:
            storage.write_json(str(tmp_path / LEASE_FILE), taken)
            time.sleep(0.01)
    assert lost == [True]
    assert "was taken over by training run other" in caplog.text
    assert (tmp_path / LEASE_FILE).exists()  # it is the other's


def test_a_lease_that_cannot_be_read_belongs_to_an_unknown_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "POLL_S", 0.01)
    monkeypatch.setattr(lease, "STALE_S", 0.05)
    (tmp_path / LEASE_FILE).write_text("{")
    with hold_lease(str(tmp_path), "training run demo"):
        pass
