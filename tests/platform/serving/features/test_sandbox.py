"""sandbox: good and bad files through decode processes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from reference.tiny_serving import write_video
from timeviper_platform.data.video_worker.child_process import DecodeChild
from timeviper_platform.serving.features.sandbox import BLOCKS_AHEAD, DecodeSandbox, MediumHead, SandboxConfig
from timeviper_platform.serving.messages import MediaBytes, MediaFile, MediaSource, Refusal

SIZE = 32
CASES = Path(__file__).parents[3] / "reference" / "cases"


def bytes_of(path: Path) -> MediaBytes:
    data = path.read_bytes()
    return MediaBytes(data=data, sha256=hashlib.sha256(data).hexdigest(), modality="video")


async def decode_process(sandbox: DecodeSandbox) -> psutil.Process:
    """The spare process. Other tests in this process may have decode processes of their own."""
    await sandbox.start()
    assert sandbox._spare is not None
    return psutil.Process((await sandbox._spare).process.pid)


@dataclass(frozen=True)
class Decoded:
    """A whole medium."""

    head: MediumHead
    frames: np.ndarray
    pts_seconds: np.ndarray
    block_sizes: list[int]


async def decode(sandbox: DecodeSandbox, source: MediaSource, *, max_frames: int, fps: float = 1.0) -> Any:
    """Returns a Decoded or a Refusal."""
    head, blocks = None, []
    async with aclosing(sandbox.blocks(source, fps=fps, max_frames=max_frames)) as items:  # type: ignore[arg-type]
        async for item in items:
            if isinstance(item, Refusal):
                return item
            if isinstance(item, MediumHead):
                head = item
            else:
                blocks.append(item)
    assert head is not None
    frames = np.concatenate([block.frames for block in blocks])
    pts = np.concatenate([block.pts_seconds for block in blocks])
    return Decoded(head, frames, pts, [len(block.frames) for block in blocks])


def in_sandbox(
    scenario: Callable[[DecodeSandbox], Coroutine[Any, Any, Any]], config: SandboxConfig | None = None
) -> Any:
    async def run() -> Any:
        sandbox = DecodeSandbox(config or SandboxConfig(), SIZE)
        try:
            return await scenario(sandbox)
        finally:
            await sandbox.close()

    return asyncio.run(run())


def test_a_file_and_its_bytes_decode_alike_and_thinned(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")

    async def scenario(sandbox: DecodeSandbox) -> list[Any]:
        file = MediaFile(uri=str(path), sha256="", modality="video")
        return [
            await decode(sandbox, file, max_frames=100),
            await decode(sandbox, bytes_of(path), max_frames=2),
        ]

    whole, thinned = in_sandbox(scenario)
    assert whole.frames.shape == (4, SIZE, SIZE, 3)
    assert [round((float(frame.mean()) - 20) / 40) for frame in whole.frames] == [0, 1, 2, 3]
    assert whole.pts_seconds.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert whole.head.end_seconds == pytest.approx(4.0)
    assert np.array_equal(thinned.frames, whole.frames[[0, 3]])


def test_a_long_video_comes_in_blocks_and_only_a_few_are_decoded_ahead(tmp_path: Path) -> None:
    """Before, all of its frames were in memory at once: 450 MB of 1,024 frames at 384 pixels."""
    media = bytes_of(write_video(tmp_path / "a.mp4", seconds=200, fps=1))

    async def scenario(sandbox: DecodeSandbox) -> tuple[Any, int]:
        whole = await decode(sandbox, media, max_frames=1000)
        sent: list[object] = []
        send = DecodeChild.send

        def counted(child: DecodeChild, job: dict[str, Any], *rest: Any, **options: Any) -> Any:
            sent.append(job["kind"])
            return send(child, job, *rest, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DecodeChild, "send", counted)
            async with aclosing(sandbox.blocks(media, fps=1.0, max_frames=1000)) as items:
                _ = await anext(items), await anext(items)
        return whole, sent.count("block")

    whole, num_ahead = in_sandbox(scenario)
    assert whole.block_sizes == [64, 64, 64, 8]
    assert (whole.head.num_frames, whole.pts_seconds.tolist()) == (200, [float(second) for second in range(200)])
    assert num_ahead == 1 + BLOCKS_AHEAD


def test_a_killed_decode_process_ends_a_medium_after_its_first_frames(tmp_path: Path) -> None:
    media = bytes_of(write_video(tmp_path / "a.mp4", seconds=400, fps=1))

    async def scenario(sandbox: DecodeSandbox) -> list[Any]:
        process, found = await decode_process(sandbox), []
        async with aclosing(sandbox.blocks(media, fps=1.0, max_frames=1000)) as items:
            async for item in items:
                found.append(item)
                if len(found) == 2:
                    process.kill()
        return found

    *blocks, refusal = in_sandbox(scenario)
    assert 1 <= len(blocks) - 1 <= 1 + BLOCKS_AHEAD
    assert (refusal.status, refusal.code) == (422, "decode_failed")


def test_media_that_cannot_be_decoded_are_a_422_with_the_reason(tmp_path: Path) -> None:
    good = write_video(tmp_path / "a.mp4").read_bytes()
    files = {"cut": good[: len(good) // 3], "text": b"this is not a video\n" * 50, "empty": b""}
    codes = {}

    async def scenario(sandbox: DecodeSandbox) -> None:
        for name, data in files.items():
            answer = await decode(sandbox, MediaBytes(data=data, sha256="", modality="video"), max_frames=4)
            assert isinstance(answer, Refusal)
            assert answer.status == 422
            codes[name] = answer.code

    in_sandbox(scenario)
    assert codes == {"cut": "corrupt_file", "text": "unknown_format", "empty": "empty_file"}


def test_limits_on_pixels_frames_and_time_have_their_own_answers(tmp_path: Path) -> None:
    media = bytes_of(write_video(tmp_path / "a.mp4"))
    config = SandboxConfig()

    def refusal(config: SandboxConfig) -> tuple[int, str]:
        answer = in_sandbox(lambda sandbox: decode(sandbox, media, max_frames=4), config)
        return answer.status, answer.code

    assert refusal(replace(config, max_pixels=1000)) == (422, "too_many_pixels")
    assert refusal(replace(config, max_frames=3)) == (422, "too_many_frames")
    assert refusal(replace(config, deadline_s=0.0001)) == (408, "decode_timeout")


def test_a_missing_stored_file_is_a_503() -> None:
    file = MediaFile(uri="/nowhere/a.media", sha256="", modality="video")
    answer = in_sandbox(lambda sandbox: decode(sandbox, file, max_frames=4))
    assert (answer.status, "nowhere" in answer.message) == (503, False)


def test_a_killed_decode_process_is_a_refusal_and_the_next_one_works(tmp_path: Path) -> None:
    media = bytes_of(write_video(tmp_path / "a.mp4"))

    async def scenario(sandbox: DecodeSandbox) -> tuple[Any, Any]:
        (await decode_process(sandbox)).kill()
        return (
            await decode(sandbox, media, max_frames=4),
            await decode(sandbox, media, max_frames=4),
        )

    dead, alive = in_sandbox(scenario)
    assert (dead.status, dead.code) == (422, "decode_failed")
    assert len(alive.frames) == 4


def test_decode_processes_get_no_secrets_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, they inherited the credentials of the object store, and the network."""
    for name in ("SECRET_TOKEN", "AWS_SECRET_ACCESS_KEY", "FSSPEC_S3_KEY"):
        monkeypatch.setenv(name, "x")

    async def scenario(sandbox: DecodeSandbox) -> tuple[bytes, Path, str, bool]:
        process = await decode_process(sandbox)
        assert sandbox._spare is not None
        has_network = (await sandbox._spare).process.has_network
        interfaces = Path(f"/proc/{process.pid}/net/dev").read_text()
        return Path(f"/proc/{process.pid}/environ").read_bytes(), Path(process.cwd()), interfaces, has_network

    environment, folder, interfaces, has_network = in_sandbox(scenario)
    for secret in (b"SECRET_TOKEN", b"AWS_", b"FSSPEC_"):
        assert secret not in environment
    assert b"PYTHONPATH" in environment
    assert f"TMPDIR={folder}".encode() in environment
    assert folder.name.startswith("decode-")
    assert not folder.exists()
    if not has_network:  # the kernel allows namespaces
        assert {line.split(":")[0].strip() for line in interfaces.splitlines()[2:]} <= {
            "lo",
            "sit0",
            "tunl0",
            "ip6tnl0",
        }


def test_a_file_in_an_object_store_is_fetched_for_the_decode_process(tmp_path: Path) -> None:
    """It has neither credentials nor a network; before, it read the store itself."""
    import fsspec

    data = write_video(tmp_path / "a.mp4").read_bytes()
    fsspec.filesystem("memory").pipe("/bucket/a.media", data)

    async def scenario(sandbox: DecodeSandbox) -> list[Any]:
        names = ("a", "gone")
        files = [MediaFile(uri=f"memory://bucket/{name}.media", sha256="", modality="video") for name in names]
        return [await decode(sandbox, file, max_frames=4) for file in files]

    found, gone = in_sandbox(scenario)
    assert len(found.frames) == 4
    assert (gone.status, gone.code) == (503, "read_failed")


def test_the_content_decides_what_a_medium_is(tmp_path: Path) -> None:
    gif = (CASES / "media" / "anim.gif").read_bytes()
    jpeg = (CASES / "pictures" / "tail_cut_eoi.jpg").read_bytes()

    async def scenario(sandbox: DecodeSandbox) -> list[Any]:
        called = [(gif, "image"), (jpeg, "video"), (jpeg[:-200], "image")]
        media = [MediaBytes(data=data, sha256="", modality=modality) for data, modality in called]  # type: ignore[arg-type]
        return [await decode(sandbox, medium, max_frames=8) for medium in media]

    animation, whole, cut = in_sandbox(scenario)
    assert (animation.head.modality, len(animation.frames), animation.head.end_seconds) == ("video", 5, 5.0)
    assert (whole.head.modality, len(whole.frames), whole.head.end_seconds) == ("image", 1, 0.0)
    assert len(cut.frames) == 1  # what decodes of a cut picture is answered


def test_a_picture_is_one_frame_within_its_limit(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (50, 40), (200, 0, 0)).save(tmp_path / "a.png")
    file = MediaFile(uri=str(tmp_path / "a.png"), sha256="", modality="image")
    medium = in_sandbox(lambda sandbox: decode(sandbox, file, max_frames=4))
    assert (medium.frames.shape, medium.head.end_seconds) == ((1, SIZE, SIZE, 3), 0.0)
    assert (medium.frames[..., 0] == 200).all()
    config = SandboxConfig(max_pixels=1000)
    refusal = in_sandbox(lambda sandbox: decode(sandbox, file, max_frames=4), config)
    assert refusal.code == "too_many_pixels"
