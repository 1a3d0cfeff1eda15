"""feature service: stored media and uploads, without Ray."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reference.tiny_serving import (
    CONFIG_WITH_TRANSV,
    IMAGE_SIZE,
    ServingFolders,
    make_serving_folders,
    write_video,
)
from timeviper_platform.data.encode.frame_encoder import FrameEncoder
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.data.video.pictures import read_image
from timeviper_platform.data.video.reader import read_frames
from timeviper_platform.data.video.sampling import FrameSelection, thin_to_fps
from timeviper_platform.serving.features import service as module
from timeviper_platform.serving.features.blocks import BlockBoard, LostStreamError, read_blocks
from timeviper_platform.serving.features.sandbox import DecodeSandbox
from timeviper_platform.serving.features.service import FeatureService, FeatureServiceConfig
from timeviper_platform.serving.messages import (
    FeatureProgress,
    FeatureReference,
    MediaAddress,
    MediaBytes,
    MediaFile,
    MediaFrames,
    MediaSource,
    Refusal,
    StoredFeatures,
)

VISION = CONFIG_WITH_TRANSV.vision


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> ServingFolders:
    return make_serving_folders(tmp_path_factory.mktemp("features"))


def service_of(folders: ServingFolders, **config: Any) -> FeatureService:
    values = {"feature_store": folders.store, "encoder": folders.encoder, **config}
    return FeatureService(folders.weights, FeatureServiceConfig(**values), lambda array: array)


def run(service: FeatureService, scenario: Callable[[FeatureService], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        try:
            return await asyncio.wait_for(scenario(service), 60)
        finally:
            await service.close()

    return asyncio.run(main())


def stored(media_id: str = "film") -> StoredFeatures:
    return StoredFeatures(media_id=media_id)


def video_bytes(tmp_path: Path) -> bytes:
    return write_video(tmp_path / "a.mp4", seconds=6).read_bytes()


def upload(data: bytes) -> MediaBytes:
    return MediaBytes(data=data, sha256=hashlib.sha256(data).hexdigest(), modality="video")


def test_stored_media_are_listed_with_the_times_of_their_frames(folders: ServingFolders) -> None:
    service = service_of(folders, max_frames=3)
    store = FeatureStore.open(folders.store)
    ids = list(store.media_ids)

    async def scenario(service: FeatureService) -> None:
        seen: list[str] = []
        while True:
            page = await service.list_media(after=seen[-1] if seen else "", prefix="", limit=1)
            assert not isinstance(page, Refusal)
            seen += [medium.media_id for medium in page.media]
            if not page.has_more:
                break
        assert seen == ids
        page = await service.list_media(after="", prefix="fil", limit=10)
        assert [medium.media_id for medium in page.media] == [name for name in ids if name.startswith("fil")]  # type: ignore[union-attr]
        found = await service.medium("film")
        info = store.info("film")
        assert not isinstance(found, Refusal)
        assert found.pts_seconds == tuple(info.pts_seconds)
        assert found.selected == tuple(info.select(max_frames=3, fps=1.0))
        assert (found.num_frames, found.duration_seconds) == (info.num_frames, info.duration_seconds)
        missing = await service.medium("none")
        assert isinstance(missing, Refusal)
        assert missing.status == 404

    run(service, scenario)


def test_progress_counts_encoded_frames_and_ends_with_the_same_features(
    folders: ServingFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROGRESS_S", 0.001)
    monkeypatch.setattr(module, "ENCODE_BATCHES", 1)
    service = service_of(folders)
    assert service._encoder is not None
    service._encoder.config = replace(service._encoder.config, encode_batch_frames=2)
    encode = service._encoder.encode
    monkeypatch.setattr(service._encoder, "encode", lambda frames: (time.sleep(0.05), encode(frames))[1])
    source = upload(video_bytes(tmp_path))

    async def scenario(service: FeatureService) -> tuple[list[Any], Any]:
        return [item async for item in service.watch(source)], await service.features(source)

    (*notes, answer), again = run(service, scenario)
    assert notes[0] == FeatureProgress(stage="decoding", frames_done=0, frames_total=None)
    encoding = [note for note in notes if note.stage == "encoding"]
    assert sorted({note.frames_done for note in encoding}) == [0, 2, 4]
    assert {note.frames_total for note in encoding} == {6}
    assert answer is again
    plain = run(service_of(folders), lambda service: service.features(source))
    np.testing.assert_array_equal(answer.ref, plain.ref)


class LocalWriter:
    """A board on the test's event loop."""

    def __init__(self) -> None:
        self.board = BlockBoard()
        self.calls: list[Any] = []

    def append(self, stream_id: str, number: int, ref: Any) -> None:
        self._call(self.board.append(stream_id, number, [ref]))

    def end(self, stream_id: str, end: FeatureReference | Refusal) -> None:
        self._call(self.board.end(stream_id, end))

    def forget(self, stream_id: str) -> None:
        self._call(self.board.forget(stream_id))

    def address(self) -> BlockBoard:
        return self.board

    def _call(self, call: Any) -> None:
        self.calls.append(asyncio.ensure_future(call))


async def read_all(reference: FeatureReference) -> list[Any]:
    async def fetch(ref: Any) -> np.ndarray:
        array: np.ndarray = ref
        return array

    blocks = read_blocks(
        reference, fetch=fetch, next_blocks=lambda stream, number: stream.board.read(stream.stream_id, number)
    )
    return [block async for block in blocks]


def streaming_service(folders: ServingFolders, **config: Any) -> FeatureService:
    values = FeatureServiceConfig(feature_store=folders.store, encoder=folders.encoder, **config)
    return FeatureService(folders.weights, values, lambda array: array, LocalWriter())


def test_an_upload_is_read_in_blocks_before_its_last_frame_and_has_the_same_features(
    folders: ServingFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the first frame waited for the last one."""
    monkeypatch.setattr(module, "ENCODE_BATCHES", 1)
    source = upload(write_video(tmp_path / "long.mp4", seconds=18).read_bytes())

    async def scenario(service: FeatureService) -> tuple[Any, list[Any], Any, list[Any]]:
        early = await service.features(source, whole=False)
        assert isinstance(early, FeatureReference)
        reading = asyncio.create_task(read_all(early))
        whole = await service.features(source)
        return early, await reading, whole, await read_all(early)

    early, blocks, whole, late = run(streaming_service(folders), scenario)
    assert early.stream is not None
    assert (early.ref, early.key, early.num_frames, early.times_seconds) == (None, whole.key, 18, ())
    assert (early.duration_seconds, early.num_tokens_per_frame) == (whole.duration_seconds, whole.num_tokens_per_frame)
    assert len(blocks) > 1
    plain = run(service_of(folders), lambda service: service.features(source, whole=False))
    assert plain.stream is None
    assert plain.times_seconds == whole.times_seconds
    for arrays in (blocks, [whole.ref], late):
        np.testing.assert_array_equal(np.concatenate(arrays), plain.ref)


def test_a_stream_ends_with_a_refusal_or_when_its_features_are_dropped(
    folders: ServingFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [upload(write_video(tmp_path / "a.mp4", seconds=count).read_bytes()) for count in (10, 11)]
    monkeypatch.setattr(module, "ENCODE_BATCHES", 1)
    broken = Refusal(status=422, message="damaged", code="corrupt_file")
    blocks = DecodeSandbox.blocks

    async def breaking(*arguments: Any, **options: Any) -> Any:
        async for item in blocks(*arguments, **options):
            yield item
        yield broken

    async def refused(service: FeatureService) -> list[Any]:
        early = await service.features(sources[0], whole=False)
        assert isinstance(early, FeatureReference)
        assert early.stream is not None
        named = replace(early, stream=replace(early.stream, param="messages.0"))
        return [(await read_all(named))[-1], await service.features(sources[0])]

    with monkeypatch.context() as patch:
        patch.setattr(DecodeSandbox, "blocks", breaking)
        last, again = run(streaming_service(folders), refused)
    assert (last, again) == (replace(broken, param="messages.0"), broken)

    async def dropped(service: FeatureService) -> None:
        early = await service.features(sources[0], whole=False)
        assert isinstance(early, FeatureReference)
        reading = asyncio.create_task(read_all(early))
        await service.features(sources[0])
        for blocks in (await reading, await read_all(early)):
            assert sum(map(len, blocks)) == 10
        await service.features(sources[1])
        with pytest.raises(LostStreamError):
            await read_all(early)

    for num_frames in (
        12,
        5,
    ):  # with room for one video, and for none: before, nothing dropped the stream of the latter
        run(streaming_service(folders, cache_bytes=num_frames * 4 * VISION.hidden_size * 2), dropped)


def test_stored_features_are_thinned_to_the_lower_of_both_limits(folders: ServingFolders) -> None:
    async def scenario(service: FeatureService) -> list[int]:
        limits = [{}, {"max_frames": 3}, {"max_frames": 1000}, {"fps": 0.25}, {"fps": 30.0}]
        return [(await service.features(stored(), **values)).num_frames for values in limits]  # type: ignore[arg-type,union-attr]

    assert run(service_of(folders, max_frames=24), scenario) == [24, 3, 24, 10, 24]


def test_other_limits_count_for_the_next_request(folders: ServingFolders) -> None:
    async def scenario(service: FeatureService) -> list[int]:
        before = await service.features(stored())
        service.set_limits(FeatureServiceConfig(feature_store=folders.store, encoder=folders.encoder, max_frames=3))
        return [found.num_frames for found in (before, await service.features(stored()))]  # type: ignore[union-attr]

    assert run(service_of(folders, max_frames=24), scenario) == [24, 3]


def test_stored_features_are_returned_bit_for_bit(folders: ServingFolders) -> None:
    reference = run(service_of(folders), lambda service: service.features(stored()))
    expected = FeatureStore.open(folders.store).read("film")
    assert np.array_equal(reference.ref, expected.features.view(torch.int16).numpy())
    assert (reference.num_tokens_per_frame, reference.duration_seconds, reference.modality) == (4, 40.0, "video")


def test_an_unknown_id_is_a_404(folders: ServingFolders) -> None:
    for config in ({}, {"feature_store": None}):
        refusal = run(service_of(folders, **config), lambda service: service.features(stored("nothing")))
        assert (refusal.status, refusal.code) == (404, "media_not_found")


@pytest.mark.parametrize("frame_selection", ["uniform", "first"])
def test_an_upload_has_the_features_of_preprocessing(
    folders: ServingFolders, tmp_path: Path, frame_selection: FrameSelection
) -> None:
    data = video_bytes(tmp_path)
    (tmp_path / "b.media").write_bytes(data)
    file = MediaFile(uri=str(tmp_path / "b.media"), sha256="other", modality="video")

    async def scenario(service: FeatureService) -> list[FeatureReference | Refusal]:
        return [
            await service.features(upload(data), max_frames=4),
            await service.features(file, max_frames=4),
        ]

    inline, stored_file = run(service_of(folders, frame_selection=frame_selection), scenario)
    frames = read_frames(data, IMAGE_SIZE, fps=Fraction(1), max_frames=4, frame_selection=frame_selection).frames
    expected = FrameEncoder(folders.encoder).encode(frames).view(torch.int16).numpy()
    assert np.array_equal(inline.ref, expected)
    assert np.array_equal(stored_file.ref, expected)
    assert inline.duration_seconds == pytest.approx(6.0)


def test_a_medium_is_found_by_its_manifests_address(folders: ServingFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks name videos by address; preprocessing has decoded them."""
    monkeypatch.setattr(FeatureStore, "find_uri", lambda store, uri: {"/film.mp4": "film"}.get(uri))

    async def scenario(service: FeatureService) -> list[Any]:
        addresses = [MediaAddress(uri=name) for name in ("/film.mp4", "/none.mp4")]
        addresses.append(MediaAddress(uri="/disk/film.mp4", aliases=("/none.mp4", "/film.mp4")))
        return [await service.features(address, max_frames=2) for address in addresses]

    found, unknown, by_alias = run(service_of(folders), scenario)
    assert (found.num_frames, by_alias) == (2, found)
    for refusal in (unknown, *run(service_of(folders, feature_store=None), scenario)):
        assert (refusal.status, refusal.code) == (404, "media_not_found")


def test_pictures_in_a_row_are_encoded_as_one_video(folders: ServingFolders, tmp_path: Path) -> None:
    """One decode task and full encoder batches: each picture alone would fill its batch with padding."""
    pictures = []
    for number in range(6):
        Image.new("RGB", (40 + number, 30), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
        pictures.append(replace(upload((tmp_path / f"{number}.png").read_bytes()), modality="image"))
    file = MediaFile(uri=str(tmp_path / "0.png"), sha256="file", modality="image")
    service = service_of(folders, max_frames=6)
    batches = []
    encode = service._encoder.encode  # type: ignore[union-attr]
    service._encoder.encode = lambda frames: batches.append(len(frames)) or encode(frames)  # type: ignore[union-attr,method-assign,func-returns-value]

    async def scenario(service: FeatureService) -> list[Any]:
        whole = await service.features(MediaFrames.of([file, *pictures[1:]]))
        thinned = await service.features(MediaFrames.of(pictures), max_frames=3)
        too_many = await service.features(MediaFrames.of([*pictures, file]))
        damaged = await service.features(MediaFrames.of([pictures[0], upload(b"no picture")]))
        return [whole, thinned, too_many, damaged]

    whole, thinned, too_many, damaged = run(service, scenario)
    assert batches == [4, 2, 3]  # of four
    frames = [read_image(picture.data, IMAGE_SIZE).frames for picture in pictures]
    expected = FrameEncoder(folders.encoder).encode(np.concatenate(frames)).view(torch.int16).numpy()
    assert np.array_equal(whole.ref, expected)
    assert (whole.modality, whole.duration_seconds, thinned.num_frames) == ("image", 0.0, 3)
    assert (too_many.status, too_many.code) == (400, "too_many_frames")
    assert damaged.status == 422


def test_an_upload_that_the_store_knows_is_not_decoded(
    folders: ServingFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(folders, encoder=None)
    known_hash = hashlib.sha256(b"known").hexdigest()
    monkeypatch.setattr(FeatureStore, "find", lambda store, sha256: {known_hash: "film"}.get(sha256))
    known = run(service, lambda service: service.features(upload(b"known"), max_frames=2))
    assert known.num_frames == 2
    unknown = run(service, lambda service: service.features(upload(b"unknown")))
    assert (unknown.status, unknown.code) == (400, "uploads_disabled")


def test_features_are_computed_once_for_concurrent_requests_and_cached(folders: ServingFolders, tmp_path: Path) -> None:
    data = video_bytes(tmp_path)
    puts = []
    config = FeatureServiceConfig(feature_store=folders.store, encoder=folders.encoder)
    service = FeatureService(folders.weights, config, lambda array: puts.append(array) or array)

    async def scenario(service: FeatureService) -> list[Any]:
        first = asyncio.create_task(service.features(upload(data)))
        others = [asyncio.create_task(service.features(upload(data))) for _ in range(3)]
        await asyncio.sleep(0)
        first.cancel()  # the first caller may disconnect
        return [*(await asyncio.gather(*others)), await service.features(upload(data))]

    answers = run(service, scenario)
    assert len(puts) == 1
    assert all(answer is answers[0] for answer in answers)


def test_an_upload_that_nobody_waits_for_is_decoded_no_further(
    folders: ServingFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, uploads of clients that had left were decoded to their end, each before those that still wait."""
    events = []

    async def endless(*_: Any, **__: Any) -> AsyncGenerator[Any]:
        events.append("begun")
        try:
            await asyncio.sleep(60)
            yield
        finally:
            events.append("closed")

    monkeypatch.setattr(DecodeSandbox, "blocks", endless)

    async def scenario(service: FeatureService) -> None:
        def ask() -> asyncio.Task[Any]:
            return asyncio.create_task(service.features(upload(b"video"), whole=len(events) == 0))

        first, second = ask(), ask()
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.sleep(0.05)
        assert events == ["begun"]  # one still waits
        second.cancel()
        third = ask()  # not taken for a part of what has been cancelled
        await asyncio.sleep(0.05)
        assert events == ["begun", "closed", "begun"]
        assert not third.done()
        third.cancel()
        await asyncio.sleep(0.05)
        assert (events[-1], service._ongoing) == ("closed", {})

    run(service_of(folders), scenario)


def test_tenants_share_stored_features_and_no_others(folders: ServingFolders, tmp_path: Path) -> None:
    """Before, a quick answer about an upload told that another tenant had asked about the same file."""
    source, puts = upload(video_bytes(tmp_path)), []
    config = FeatureServiceConfig(feature_store=folders.store, encoder=folders.encoder)
    service = FeatureService(folders.weights, config, lambda array: puts.append(array) or array)

    async def scenario(service: FeatureService) -> list[Any]:
        media: list[MediaSource] = [source, stored()]
        return [await service.features(one, tenant=tenant) for one in media for tenant in ("a", "b", "a")]

    first, other, again, *of_the_store = run(service, scenario)
    assert first is again
    assert first.key != other.key
    np.testing.assert_array_equal(first.ref, other.ref)
    assert len({id(answer) for answer in of_the_store}) == 1
    assert len(puts) == 3


def test_cached_features_are_evicted_least_recently_used_first(folders: ServingFolders) -> None:
    frame_bytes = 4 * VISION.hidden_size * 2
    puts: list[int] = []
    config = FeatureServiceConfig(feature_store=folders.store, cache_bytes=5 * frame_bytes)
    service = FeatureService(folders.weights, config, lambda array: puts.append(len(array)))

    async def scenario(service: FeatureService) -> None:
        for max_frames in (2, 3, 2, 1, 2, 3):  # 1 pushes out 3, used longest ago
            await service.features(stored(), max_frames=max_frames)

    run(service, scenario)
    assert puts == [2, 3, 1, 3]


def test_cached_features_end_with_their_age(folders: ServingFolders) -> None:
    """Those of a deleted upload stayed until others needed the room."""
    puts: list[int] = []
    config = FeatureServiceConfig(feature_store=folders.store, cache_max_age_s=0.2)
    service = FeatureService(folders.weights, config, lambda array: puts.append(len(array)))

    async def scenario(service: FeatureService) -> None:
        for pause_s in (0.0, 0.0, 0.3):
            await asyncio.sleep(pause_s)
            await service.features(stored(), max_frames=2)
        assert service._kept_bytes == 2 * 4 * VISION.hidden_size * 2

    run(service, scenario)
    assert puts == [2, 2]


def test_a_bad_upload_is_refused_and_not_cached(folders: ServingFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode = DecodeSandbox.blocks

    def counted(*arguments: Any, **options: Any) -> Any:
        decoded.append(arguments)
        return decode(*arguments, **options)

    async def scenario(service: FeatureService) -> Any:
        return [await service.features(upload(b"this is not a video" * 10)) for _ in range(2)]

    monkeypatch.setattr(DecodeSandbox, "blocks", counted)
    for refusal in run(service_of(folders), scenario):
        assert (refusal.status, refusal.code) == (422, "unknown_format")
    assert len(decoded) == 2


def test_media_that_are_preprocessed_later_are_found_without_a_restart(
    folders: ServingFolders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, the store was as at the start until the next deployment."""
    recipe = FeatureStore.open(folders.store).recipe
    old, new = (torch.full((3, 4, VISION.hidden_size), value).bfloat16() for value in (1.0, 2.0))
    for name, media in (("store", {"a": old}), ("later", {"a": new, "b": new}), ("other", {"a": new})):
        write_store(str(tmp_path / name), media, recipe=recipe if name != "other" else {**recipe, "fps": "7"})
    service = service_of(folders, feature_store=str(tmp_path / "store"), encoder=None, store_refresh_s=0.05)

    async def changed(service: FeatureService, name: str, done: Callable[[], bool]) -> None:
        shutil.rmtree(tmp_path / "store")
        shutil.copytree(tmp_path / name, tmp_path / "store")
        while not done():
            await asyncio.sleep(0.02)

    async def scenario(service: FeatureService) -> None:
        await service.start()
        first = await service.features(stored("a"))
        assert (await service.features(stored("b"))).code == "media_not_found"  # type: ignore[union-attr]
        await changed(service, "later", lambda: service.gauges()["stored_media"] == 2)
        second, added = [await service.features(stored(name)) for name in "ab"]
        assert first.key != second.key  # type: ignore[union-attr]
        for reference in (second, added):
            np.testing.assert_array_equal(reference.ref, new.view(torch.int16).numpy())  # type: ignore[union-attr]
        await changed(service, "other", lambda: "another recipe" in caplog.text)
        assert await service.features(stored("b")) is added

    run(service, scenario)


def test_metrics_say_where_features_came_from(folders: ServingFolders, tmp_path: Path) -> None:
    class Counts:
        def __init__(self) -> None:
            self.values: dict[Any, float] = {}

        def add(self, name: str, amount: float, **tags: str) -> None:
            key = (name, *tags.values())
            self.values[key] = self.values.get(key, 0) + amount

        def observe(self, name: str, value: float, **tags: str) -> None:
            assert value > 0
            self.add(name, 1, **tags)

        def report(self, values: Any) -> None:
            pass

    counts = Counts()
    config = FeatureServiceConfig(feature_store=folders.store, encoder=folders.encoder)
    service = FeatureService(folders.weights, config, lambda array: array, metrics=counts)

    async def scenario(service: FeatureService) -> None:
        for source in (stored(), stored(), upload(video_bytes(tmp_path)), upload(b"no video")):
            await service.features(source)

    run(service, scenario)
    assert counts.values == {
        ("requests", "store", "ok"): 1,
        ("requests", "cache", "ok"): 1,
        ("requests", "upload", "ok"): 1,
        ("requests", "upload", "unknown_format"): 1,
        ("seconds", "store"): 1,
        ("seconds", "upload"): 2,
        ("frames",): 6,
    }


def test_a_failing_store_is_a_503(folders: ServingFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(store: FeatureStore, media_id: str, frames: Any) -> Any:
        raise RuntimeError("the disk is away")

    service = service_of(folders)
    monkeypatch.setattr(FeatureStore, "read", broken)
    refusal = run(service, lambda service: service.features(stored()))
    assert (refusal.status, refusal.code) == (503, "features_failed")
    assert "disk" not in refusal.message


def test_a_lower_rate_takes_the_first_frame_of_each_interval() -> None:
    assert thin_to_fps([0.0, 1.0, 2.0, 3.0, 4.0], 0.5) == [0, 2, 4]
    assert thin_to_fps([0.0, 1.0, 2.0], 5.0) == [0, 1, 2]
    assert thin_to_fps([10.0, 11.0, 15.0, 16.0], 0.5) == [0, 2, 3]
    assert thin_to_fps([], 1.0) == []


def test_an_encoder_that_differs_from_the_stores_is_refused(folders: ServingFolders) -> None:
    other = replace(folders.encoder, encode_batch_frames=8)
    with pytest.raises(ValueError, match="encode_batch_frames: 8 and 4") as caught:
        service_of(folders, encoder=other)
    assert folders.store in str(caught.value)
    assert folders.encoder.model in str(caught.value)
    with pytest.raises(ValueError, match="compiled: True and False"):
        service_of(folders, encoder=replace(folders.encoder, compile=True))


def test_a_store_of_another_release_is_refused_with_a_fix(folders: ServingFolders, tmp_path: Path) -> None:
    store = Path(shutil.copytree(folders.store, tmp_path / "store"))
    header = json.loads((store / "store.json").read_text())
    header["recipe"]["recipe_version"] -= 1
    (store / "store.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"recipe_version: \d and \d\n.*preprocess into a new folder"):
        service_of(folders, feature_store=str(store))


def test_weights_for_other_features_are_refused(folders: ServingFolders, tmp_path: Path) -> None:
    config = json.loads((Path(folders.weights) / "config.json").read_text())
    config["vision_config"]["num_tokens_per_frame"] = 16
    config["timeviper_metadata"] = {"recipe_hash": "0" * 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wrong = replace(folders, weights=str(tmp_path))
    for settings in ({"encoder": None}, {"feature_store": None}):
        with pytest.raises(ValueError, match="num_tokens_per_frame: 16 and 4") as caught:
            service_of(wrong, **settings)
        assert str(tmp_path) in str(caught.value)
    config["vision_config"]["num_tokens_per_frame"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="recipe_hash"):
        service_of(wrong)


@pytest.mark.parametrize("values", [{}, {"feature_store": "x", "fps": 0.0}, {"feature_store": "x", "max_frames": 0}])
def test_a_configuration_without_features_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs a feature_store|must be above 0"):
        FeatureServiceConfig(**values)


def test_a_key_covers_content_recipe_and_frames(folders: ServingFolders, tmp_path: Path) -> None:
    data = video_bytes(tmp_path)

    async def scenario(service: FeatureService) -> list[str]:
        requests: list[tuple[MediaSource, dict[str, Any]]] = [
            (stored(), {}),
            (stored(), {"fps": 30.0}),  # above the stored rate: the same frames
            (stored(), {"max_frames": 3}),
            (stored(), {"fps": 0.25}),
            (upload(data), {}),
            (upload(data), {"max_frames": 3}),
            (upload(video_bytes_of(tmp_path, seconds=5)), {}),
        ]
        return [(await service.features(source, **limits)).key for source, limits in requests]  # type: ignore[union-attr]

    service = service_of(folders)
    stored_key, same, *others = run(service, scenario)
    assert stored_key == same
    assert len({stored_key, *others}) == 6
    other_recipe = service_of(folders)
    assert other_recipe.store is not None
    other_recipe.store.recipe_hash = "another"
    other_recipe.recipe = "another"
    assert not set(run(other_recipe, scenario)) & {stored_key, *others}


def video_bytes_of(tmp_path: Path, *, seconds: int) -> bytes:
    return write_video(tmp_path / "b.mp4", seconds=seconds).read_bytes()
