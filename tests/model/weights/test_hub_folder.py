"""Damaged and foreign folders are refused in one line with the file and the cure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from timeviper_model.weights.hub_folder import load_json, local_folder, stored_tensors
from timeviper_model.weights.weights_folder import load_text_config

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SHARD = "model-00001-of-00002.safetensors"


def whole(folder: Path) -> Path:
    save_file({"a": torch.ones(8), "b": torch.zeros(2, 3)}, folder / "model.safetensors")
    return folder / "model.safetensors"


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(POINTER)


def half(folder: Path) -> None:
    path = whole(folder)
    path.write_bytes(path.read_bytes()[:-10])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").touch()


def half_a_header(folder: Path) -> None:
    path = whole(folder)
    path.write_bytes(path.read_bytes()[:20])


def html(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<!doctype html><p>Not found" * 9)


def no_weights(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def adapter(folder: Path) -> None:
    save_file({"a": torch.ones(8)}, folder / "adapter_model.safetensors")


def half_the_shards(folder: Path) -> None:
    whole(folder).rename(folder / SHARD)
    weight_map = {"a": SHARD, "b": SHARD, "c": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def not_a_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"PK but not a whole archive")


def a_pickled_object(folder: Path) -> None:
    torch.save({"epoch": 3}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pointer, r"model\.safetensors is a Git LFS pointer, not the file; run `git lfs pull`"),
        (half, r"model\.safetensors has \d+ of \d+ bytes .*; download it again"),
        (empty, r"model\.safetensors is empty; download it again"),
        (half_a_header, r"model\.safetensors is not a whole safetensors file"),
        (html, r"model\.safetensors is not a whole safetensors file"),
        (no_weights, r"has no \.safetensors file and no pytorch_model\.bin; download it again"),
        (adapter, r"has only an adapter, adapter_model\.safetensors; merge it"),
        (half_the_shards, r"are missing: model-00002-of-00002\.safetensors; download it again"),
        (not_a_pickle, r"pytorch_model\.bin cannot be read as PyTorch weights"),
        (a_pickled_object, r"pytorch_model\.bin: epoch is a int, not a tensor"),
    ],
)
def test_damaged_weights_are_named_with_their_cure(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        list(stored_tensors(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no config\.json; download it again"),
        (b"", r"config\.json is empty"),
        (POINTER, r"config\.json is a Git LFS pointer"),
        (b'{"model_type": "qwen', r"config\.json is not JSON"),
        (b"[1]", r"config\.json holds a list, not an object"),
    ],
)
def test_a_damaged_configuration_is_named_with_its_cure(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_text_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"there is no folder '/no/where'; create it, or name a Hugging Face"):
        local_folder("/no/where")
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match="is a file; name the folder that holds it"):
        local_folder(tmp_path / "model.bin")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'someone/no-such-model' is neither a folder nor") as caught:
        load_json("someone/no-such-model", "config.json", revision="v1")
    assert "\n" not in str(caught.value)


def test_a_hub_answer_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    answer = SimpleNamespace(headers={}, request=None)

    def refuse(kind: type[Exception]) -> Callable[..., str]:
        def snapshot(*_: object, **__: object) -> str:
            raise kind("first\nsecond", response=answer)  # type: ignore[call-arg]

        return snapshot

    for kind, message in (
        (errors.GatedRepoError, "is gated: accept its terms at https://huggingface.co/a/b, then run `hf auth login`"),
        (errors.RepositoryNotFoundError, "nor a repository of huggingface.co that this account can read"),
        (errors.RevisionNotFoundError, "has no revision = 'v9'"),
    ):
        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse(kind))
        with pytest.raises(ValueError, match=message) as caught:
            local_folder("a/b", revision="v9")
        assert "\n" not in str(caught.value)


def test_a_revision_and_only_needed_files_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot(name: str, **options: object) -> str:
        calls.append((name, options["revision"], options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    (tmp_path / "config.json").write_text("{}")
    assert load_json("a/b", "config.json", revision="4d7a") == {}
    assert calls == [("a/b", "4d7a", ["config.json"])]
    local_folder("a/b")
    assert "*.bin" in calls[-1][2]  # type: ignore[operator]  # there is no safetensors file
    whole(tmp_path)
    local_folder("a/b")
    assert "*.bin" not in calls[-1][2]  # type: ignore[operator]


def test_a_machine_without_network_uses_the_files_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class IncompleteSnapshotError(OSError):
        snapshot_path = str(tmp_path)

    def snapshot(*_: object, **__: object) -> str:
        raise IncompleteSnapshotError("the README is missing")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert load_json("a/b", "config.json") == {"a": 1}
    with pytest.raises(ValueError, match=r"has no \.safetensors file"):
        list(stored_tensors(local_folder("a/b")))
