"""Animations are videos on the clock of their frame durations, composed as browsers show them."""

from __future__ import annotations

import io
import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reference.animation_files import CANVAS, Patch, composed, drawn_patches, write_apng, write_gif, write_webp
from reference.painted_numbers import painted, read_number
from timeviper_platform.benchmarks.measure import peak_resident_bytes, reset_peak, resident_bytes
from timeviper_platform.data.media.animations import scan_animation
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits
from timeviper_platform.data.media.probe import probe_media
from timeviper_platform.data.video.animation_reader import AnimationReader
from timeviper_platform.data.video.reader import DecoderPool, open_video, read_frames

CASES = Path(__file__).parents[3] / "reference" / "cases"
EXPECTED = json.loads((CASES / "media" / "expected.json").read_text())
SIZE = 64

WRITERS = {"gif": write_gif, "apng": write_apng, "webp": write_webp}
DISPOSALS = {"gif": ("keep", "clear", "restore"), "apng": ("keep", "clear", "restore"), "webp": ("keep", "clear")}


def numbered(format: str, milliseconds: list[int]) -> bytes:
    """An animation whose frame k shows number k, written by Pillow."""
    frames = [Image.fromarray(painted(number, SIZE, SIZE)) for number in range(len(milliseconds))]
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 90}}.get(format, {})
    content = io.BytesIO()
    frames[0].save(content, format, save_all=True, append_images=frames[1:], duration=milliseconds, **options)
    return content.getvalue()


@pytest.mark.parametrize("name", ["anim.gif", "anim_webp.webp"])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_an_animation_is_sampled_at_its_own_times(name: str, as_bytes: bool) -> None:
    path = CASES / "media" / name
    source = path.read_bytes() if as_bytes else str(path)
    assert probe_media(source).modality == "video"
    batch = read_frames(source, SIZE)
    found = zip(batch.times_seconds, batch.pts_seconds, map(read_number, batch.frames), strict=True)
    assert [list(frame) for frame in found] == EXPECTED[name]
    assert batch.num_missing == batch.num_damaged == 0


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF"])
def test_frames_last_as_in_browsers(format: str) -> None:
    content = numbered(format, [500, 250, 250, 1000, 0, 10, 20, 770])
    medium = probe_media(content)
    # 0 and 10 ms play as 100 ms
    starts = [Fraction(ms, 1000) for ms in (0, 500, 750, 1000, 2000, 2100, 2200, 2220)]
    end = Fraction(2990, 1000)
    assert (medium.modality, medium.duration_seconds, medium.width) == ("video", end, SIZE)
    reader = open_video(content, SIZE)
    times = sorted({*starts, *(start - Fraction(1, 1000) for start in starts[1:]), end - Fraction(1, 1000)})
    batch = reader.sample(times)
    shown = [max(k for k, start in enumerate(starts) if start <= t) for t in times]
    assert [read_number(frame) for frame in batch.frames] == shown
    assert batch.pts_seconds.tolist() == [float(starts[k]) for k in shown]
    assert reader.sample([end]).num_missing == 1


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF"])
def test_segments_come_right_in_any_order(format: str) -> None:
    content = numbered(format, [100] * 30)
    reader = AnimationReader(content, SIZE)
    order = [Fraction(k, 10) for k in range(30)]
    random.Random(0).shuffle(order)
    for t in order:
        assert read_number(reader.sample([t]).frames[0]) == t * 10


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("format", ["gif", "apng", "webp"])
def test_frames_are_composed_as_specified(format: str, seed: int) -> None:
    patches = drawn_patches(seed, 12, is_binary=format == "gif", disposals=DISPOSALS[format])
    if format == "apng" and patches[0].disposal == "restore":  # PNG 3rd edition: as clear, in the first frame
        patches[0] = Patch(pixels=patches[0].pixels, disposal="clear", is_blended=patches[0].is_blended)
    expected = composed(patches)
    content = WRITERS[format](patches)
    reader = AnimationReader(content, CANVAS)
    order = [*range(12), *random.Random(seed).sample(range(12), 12)]
    for k in order:
        frame = reader.sample([Fraction(k, 10)]).frames[0]
        assert np.abs(frame.astype(int) - expected[k]).max() <= 2, (format, seed, k)


def test_webp_is_composed_as_by_libwebp() -> None:
    content = write_webp(drawn_patches(9, 12, is_binary=False, disposals=DISPOSALS["webp"]))
    reader = AnimationReader(content, CANVAS)
    with Image.open(io.BytesIO(content)) as image:
        for k in range(12):
            image.seek(k)
            white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            frame = reader.sample([Fraction(k, 10)]).frames[0]
            assert np.abs(frame.astype(int) - np.asarray(white.convert("RGB"))).max() <= 3


def test_cleared_parts_are_white_whatever_the_background_colour_and_palette_mode() -> None:
    red = np.full((CANVAS, CANVAS, 4), [255, 0, 0, 255], np.uint8)
    small = red[:4, :4]
    patches = [Patch(pixels=red, disposal="clear"), Patch(pixels=small), Patch(pixels=small, x=8)]
    expected = composed(patches)
    for content in (write_gif(patches), write_apng(patches), write_apng(patches, "RGB"), write_apng(patches, "L")):
        frames = AnimationReader(content, CANVAS).sample([Fraction(k, 10) for k in range(3)]).frames
        assert (frames[1:, 6:, :4] == 255).all()
        if content.startswith(b"GIF"):
            assert np.array_equal(frames, expected)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF"])
def test_one_frame_is_an_image(format: str) -> None:
    content = io.BytesIO()
    Image.fromarray(painted(5)).save(content, format)
    assert probe_media(content.getvalue()).modality == "image"
    assert read_number(read_frames(content.getvalue(), SIZE).frames[0]) == 5


@pytest.mark.parametrize("format", ["gif", "apng", "webp"])
def test_a_single_animated_frame_is_an_image(format: str) -> None:
    patch = Patch(pixels=np.full((CANVAS, CANVAS, 4), 255, np.uint8))
    content = WRITERS[format]([patch])
    assert scan_animation(io.BytesIO(content), content[:512]) is None
    assert probe_media(content).modality == "image"
    with pytest.raises(DecodeError, match="no_video_stream"):
        AnimationReader(content, SIZE)


@pytest.mark.parametrize("format", ["gif", "apng", "webp"])
def test_a_cut_animation_keeps_its_whole_frames_and_counts_the_cut_one(format: str) -> None:
    patches = drawn_patches(1, 6, is_binary=format == "gif", disposals=("keep",))
    patches[-1] = Patch(pixels=np.random.default_rng(0).integers(0, 255, (CANVAS, CANVAS, 4)).astype(np.uint8) | 1)
    if format == "gif":
        patches[-1] = Patch(pixels=patches[-1].pixels[:12] | np.array([0, 0, 0, 255], np.uint8))
    content = WRITERS[format](patches)
    cut = content[:-150]
    assert probe_media(cut).duration_seconds == Fraction(6, 10)
    batch = AnimationReader(cut, CANVAS).sample([Fraction(k, 10) for k in range(6)])
    expected = composed(patches)
    assert np.abs(batch.frames[:5].astype(int) - expected[:5]).max() <= 2
    assert (len(batch.frames), batch.num_missing, batch.num_damaged) == (6, 0, 1)


def test_a_broken_frame_is_damage_until_a_frame_covers_it() -> None:
    grey = [np.full((CANVAS, CANVAS, 4), (value, value, value, 255), np.uint8) for value in (10, 60, 110, 160)]
    patches = [*(Patch(pixels=pixels[:4]) for pixels in grey[:3]), Patch(pixels=grey[3], is_blended=False)]
    content = bytearray(write_apng(patches))
    place = content.index(b"fdAT") + 10  # in the second frame
    content[place : place + 8] = bytes(8)
    batch = AnimationReader(bytes(content), CANVAS).sample([Fraction(k, 10) for k in range(4)])
    assert (len(batch.frames), batch.num_missing, batch.num_damaged) == (4, 0, 2)
    assert (batch.frames[3] == 160).all()


def test_a_frame_that_breaks_its_format_is_damage() -> None:
    patches = [Patch(pixels=np.full((CANVAS, CANVAS, 4), 255 - 50 * k, np.uint8), is_blended=False) for k in range(4)]
    content = bytearray(write_apng(patches))
    content[content.index(b"fcTL", content.index(b"IDAT")) - 5] ^= 1  # the checksum of the first
    second = content.index(b"fcTL", content.index(b"fcTL") + 1)
    content[second + 16 : second + 20] = (2).to_bytes(4, "big")  # its x: it exceeds the canvas
    batch = AnimationReader(bytes(content), CANVAS).sample([Fraction(k, 10) for k in range(4)])
    assert (len(batch.frames), batch.num_missing, batch.num_damaged) == (4, 0, 2)


def test_many_frames_take_the_memory_of_one() -> None:
    content = bytearray(write_gif([Patch(pixels=np.zeros((CANVAS, CANVAS, 4), np.uint8))]))
    screen = (1024).to_bytes(2, "little") * 2
    content[6:10] = screen
    frame = bytes(content[13 + 768 : -1])
    animation = bytes(content[: 13 + 768]) + frame * 300 + b";"  # 1.2 GB of canvases
    reset_peak()
    before = resident_bytes()
    batch = AnimationReader(animation, CANVAS).sample([Fraction(29), Fraction(299, 10)])
    assert len(batch.frames) == 2
    assert peak_resident_bytes() - before < 64 << 20


def test_limits_hold_for_the_canvas_and_for_each_frame() -> None:
    limits = MediaLimits(max_pixels=CANVAS * CANVAS)
    patches = [Patch(pixels=np.zeros((CANVAS, CANVAS, 4), np.uint8))] * 2
    content = bytearray(write_gif(patches))
    assert len(AnimationReader(bytes(content), SIZE, limits=limits).sample([Fraction(0)]).frames) == 1
    content[content.rindex(b",") + 5 : content.rindex(b",") + 9] = b"\xff\xff\xff\xff"  # 65,535 x 65,535 pixels
    batch = AnimationReader(bytes(content), SIZE, limits=limits).sample([Fraction(0), Fraction(1, 10)])
    assert batch.num_damaged == 1
    content[6:8] = b"\xff\xff"
    with pytest.raises(DecodeError, match=ErrorType.TOO_MANY_PIXELS):
        probe_media(bytes(content), limits)


def test_a_pool_reads_animations_and_pictures_by_content(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.mp4"):
        (tmp_path / name).write_bytes(numbered("GIF", [100, 100]))
    pool = DecoderPool(SIZE, max_open=1)
    for k, name in ((1, "a.jpg"), (0, "b.mp4"), (0, "a.jpg"), (1, "b.mp4")):
        assert read_number(pool.sample(str(tmp_path / name), [Fraction(k, 10)]).frames[0]) == k
    pool.close()


@pytest.mark.parametrize("options", [{"backend": "decord"}, {"backend": "torchcodec"}, {"keyframe_step": Fraction(1)}])
def test_every_backend_leaves_animations_to_pillow(options: dict[str, Any]) -> None:
    reader = open_video(numbered("GIF", [1000, 1000]), SIZE, **options)
    assert [read_number(frame) for frame in reader.sample([Fraction(0), Fraction(1)]).frames] == [0, 1]


def test_the_default_image_of_an_apng_is_not_a_frame() -> None:
    frames = [Image.fromarray(painted(number, SIZE, SIZE)) for number in range(4)]
    content = io.BytesIO()
    frames[0].save(content, "PNG", save_all=True, append_images=frames[1:], default_image=True, duration=500)
    batch = read_frames(content.getvalue(), SIZE, fps=Fraction(2))
    assert [read_number(frame) for frame in batch.frames] == [1, 2, 3]


def test_a_webp_frame_that_chunks_do_not_follow_is_cut() -> None:
    content = numbered("WEBP", [1000] * 4)
    whole = scan_animation(io.BytesIO(content), content)
    assert whole is not None
    middle = (whole.frames[1].offset + whole.frames[1].end) // 2
    broken = content[:middle] + bytes(64) + content[middle:]  # the third frame cannot be found
    found = scan_animation(io.BytesIO(broken), broken)
    assert found is not None
    assert [frame.is_cut for frame in found.frames] == [False, True]
    assert read_frames(broken, SIZE).num_damaged == 1
    cut = content[: whole.frames[1].end]  # the header promises more
    found = scan_animation(io.BytesIO(cut), cut)
    assert found is not None
    assert [frame.is_cut for frame in found.frames] == [False, True]
    trailing = content + bytes(64)  # behind the last chunk anything may follow
    found = scan_animation(io.BytesIO(trailing), trailing)
    assert found is not None
    assert [frame.is_cut for frame in found.frames] == [False] * 4
