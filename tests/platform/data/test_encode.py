"""Tokens do not depend on the company a frame keeps in its batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reference.made_media import make_encoder
from timeviper_platform.data.encode import EncoderConfig, FrameEncoder


def made_frames(count: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_a_lone_frame_has_the_bytes_it_has_in_a_full_batch_at_width_1152(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path, hidden_size=1152)
    encoder = FrameEncoder(EncoderConfig(encoder=str(folder), num_tokens_per_frame=4, encode_batch_frames=8))
    frames = made_frames(11, encoder.image_size)
    together = encoder.encode(frames)
    assert together.shape == (11, 4, 1152)
    assert together.dtype == torch.bfloat16
    for number in (0, 7, 10):
        alone = encoder.encode(frames[number : number + 1])
        assert torch.equal(alone[0].view(torch.int16), together[number].view(torch.int16))
    backwards = encoder.encode(frames.flip(0)).flip(0)
    assert torch.equal(backwards.view(torch.int16), together.view(torch.int16))


def test_the_batch_shape_is_fixed_and_no_frame_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = FrameEncoder(EncoderConfig(encoder=str(make_encoder(tmp_path)), merge_heads=4, encode_batch_frames=4))
    shapes = []
    forward = encoder._vision.forward
    monkeypatch.setattr(encoder._vision, "forward", lambda pixels: shapes.append(len(pixels)) or forward(pixels))
    for count in (0, 1, 4, 9):
        assert encoder.encode(made_frames(count, 32).numpy()).shape == (count, 16, 16)
    assert shapes == [4] * 5


def test_the_recipe_names_what_decides_the_values(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = make_encoder(tmp_path / "a", seed=0), make_encoder(tmp_path / "b", seed=1)
    recipe = FrameEncoder(EncoderConfig(encoder=str(one))).recipe
    assert recipe == FrameEncoder(EncoderConfig(encoder=str(one))).recipe
    for changed in (
        EncoderConfig(encoder=str(other)),
        EncoderConfig(encoder=str(one), layer=-1),
        EncoderConfig(encoder=str(one), num_tokens_per_frame=4),
        EncoderConfig(encoder=str(one), merge_heads=4),
        EncoderConfig(encoder=str(one), dtype="bfloat16"),
        EncoderConfig(encoder=str(one), encode_batch_frames=7),
        EncoderConfig(encoder=str(one), compile=True),
    ):
        assert FrameEncoder(changed).recipe != recipe
    with pytest.raises(ValueError, match="at least 1"):
        EncoderConfig(encode_batch_frames=0)


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_tokens_within_rounding(tmp_path: Path) -> None:
    folder = str(make_encoder(tmp_path))
    config = EncoderConfig(encoder=folder, num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=4)
    plain, compiled = FrameEncoder(config), FrameEncoder(replace(config, compile=True))
    frames = made_frames(6, plain.image_size)
    torch.testing.assert_close(compiled.encode(frames), plain.encode(frames), rtol=2**-6, atol=2**-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
