"""Outputs that Ray would delete, storage that nodes do not share, and resources that no node has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from timeviper_platform.common import cluster_checks, storage
from timeviper_platform.common.cluster_checks import (
    SUBMITTED_VARIABLE,
    StorageProof,
    check_cluster_can_give,
    check_every_node,
    refuse_lost_outputs,
    storage_proof,
)


@pytest.mark.parametrize("uri", ["outputs/features", "./features", "file://outputs/features"])
def test_relative_outputs_of_a_submitted_job_are_refused(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    refuse_lost_outputs({"feature_store": uri})  # started by hand: relative to the user's folder
    monkeypatch.setenv(SUBMITTED_VARIABLE, "{}")
    with pytest.raises(ValueError, match=f"feature_store = '{uri}' lies in the working folder of a submitted job"):
        refuse_lost_outputs({"feature_store": uri})
    refuse_lost_outputs({"feature_store": "/mnt/features", "runs": "s3://bucket/runs", "cache": None})


def test_outputs_inside_an_unpacked_job_are_refused_by_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for uri in ("features", str(folder / "features"), str(tmp_path / "link" / "features")):
        with pytest.raises(ValueError, match="which Ray deletes"):
            refuse_lost_outputs({"feature_store": uri})
    refuse_lost_outputs({"feature_store": str(tmp_path / "features")})


def test_a_proof_is_found_where_the_driver_writes_and_leaves_no_trace(tmp_path: Path) -> None:
    folder, other = tmp_path / "store", tmp_path / "other"
    other.mkdir()
    with storage_proof({"feature_store": str(folder)}, {"input": str(tmp_path)}) as proof:
        proof.check()
        elsewhere = StorageProof(folders={"feature_store": str(other)}, inputs={"input": "/no/film"}, file=proof.file)
        assert elsewhere.problems() == [
            f"feature_store {other} is not the folder that the driver writes to",
            "input /no/film does not exist there",
        ]
        with pytest.raises(RuntimeError, match="mount it at the same path on every node"):
            elsewhere.check()
    assert list(folder.iterdir()) == []


@pytest.mark.cluster
def test_every_node_is_asked_and_named(tmp_path: Path, ray_address: str) -> None:
    import ray

    ray.init(log_to_driver=False)
    with storage_proof({"feature_store": str(tmp_path / "store")}) as proof:
        assert check_every_node(proof) == 1
        storage.remove(str(tmp_path / "store"))
        with pytest.raises(RuntimeError, match=r"node [\d.]+: feature_store .*/store is not the folder"):
            check_every_node(proof)


@pytest.mark.parametrize(
    ("nodes", "types", "can_grow", "message"),
    [
        ([{"CPU": 8.0}], None, False, "8 GPUs wanted by each worker, largest node has 0, and .*; use a CPU"),
        ([{"CPU": 8.0, "GPU": 4.0}, {"GPU": 2.0}], None, False, "8 GPUs wanted by each worker, largest node has 4"),
        ([{"CPU": 8.0}], [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 4.0}], True, "largest node has 0, and the cluster adds"),
        ([{"CPU": 0.5, "GPU": 8.0}, {"CPU": 8.0}], None, False, "no node has 1 CPU, 8 GPU together"),
        ([{"CPU": 8.0, "GPU": 8.0}], None, False, None),
        ([{"CPU": 8.0}], None, True, None),
        ([{"CPU": 8.0}], [{"CPU": 96.0, "GPU": 8.0}], True, None),
        ([], None, False, None),
    ],
)
def test_a_worker_larger_than_any_node_is_refused_unless_nodes_may_come(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[Mapping[str, float]],
    types: list[dict[str, float]] | None,
    can_grow: bool,
    message: str | None,
) -> None:
    monkeypatch.setattr(cluster_checks, "working_nodes", lambda: [{"Resources": node} for node in nodes])
    monkeypatch.setattr(cluster_checks, "largest_node_types", lambda: types)
    monkeypatch.setattr(cluster_checks, "has_autoscaler", lambda: can_grow)

    def check() -> None:
        check_cluster_can_give({"CPU": 1, "GPU": 8}, wanted_by="each worker", way_out="use a CPU")

    if message is None:
        check()
        return
    with pytest.raises(ValueError, match=message):
        check()
