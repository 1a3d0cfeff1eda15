"""Pictures and animations through the whole job without Ray: what they are, what is stored, and what reads it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import torch
from PIL import Image

from reference.media_corpus import make_config
from reference.painted_numbers import painted
from timeviper_platform.data.encode.frame_encoder import FrameEncoder
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.verify import verify_store
from timeviper_platform.data.video.reader import read_frames

CASES = Path(__file__).parents[3] / "reference" / "cases"


def make_media(folder: Path) -> None:
    folder.mkdir()
    for name in ("avif.avif", "big_icc.png", "exif_srational_zero.jpg", "really_gif.jpg", "tail_cut_eoi.jpg"):
        shutil.copy(CASES / "pictures" / name, folder)
    shutil.copy(CASES / "media" / "anim.gif", folder / "animation.jpg")  # the content decides
    shutil.copy(CASES / "media" / "anim_webp.webp", folder / "animation.mp4")
    frames = [Image.fromarray(painted(number, 64, 64)) for number in range(130)]
    frames[0].save(folder / "long.gif", save_all=True, append_images=frames[1:], duration=1000)  # three segments
    Image.fromarray(painted(8)).save(folder / "cut.jpg")
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    Image.new("1", (40_000, 100)).save(folder / "narrow.png")


def test_pictures_and_animations_are_stored_or_counted(corpus: Path, tmp_path: Path) -> None:
    make_media(tmp_path / "media")
    config = dataclasses.replace(make_config(corpus, tmp_path / "store"), input=str(tmp_path / "media"))
    run_preprocess(config, run=run_in_process)
    rejects = pq.read_table(tmp_path / "store" / "rejects.parquet").to_pylist()
    assert {Path(row["uri"]).name: (row["status"], row["error_stage"], row["error_type"]) for row in rejects} == {
        "cut.jpg": ("partial", "decode_image", "frames_damaged"),
        "narrow.png": ("error", "probe", "too_narrow"),
    }
    assert verify_store(config.feature_store).num_problems == 0

    store = FeatureStore.open(config.feature_store)
    found = {Path(store.info(media_id).uri).name: store.info(media_id) for media_id in store.media_ids}
    shown = {name: (info.modality, info.num_frames, info.duration_seconds) for name, info in found.items()}
    pictures = ("avif.avif", "big_icc.png", "exif_srational_zero.jpg", "really_gif.jpg", "tail_cut_eoi.jpg", "cut.jpg")
    assert shown == {
        **dict.fromkeys(pictures, ("image", 1, 0.0)),
        **dict.fromkeys(("animation.jpg", "animation.mp4"), ("video", 5, 5.0)),
        "long.gif": ("video", 130, 130.0),
    }
    assert found["animation.jpg"].pts_seconds.tolist() == [0, 1, 2, 3, 4]
    encoder = FrameEncoder(config.encoder)
    for name, info in found.items():
        frames = read_frames(str(tmp_path / "media" / name), encoder.image_size).frames
        assert torch.equal(
            store.read(info.media_id).features.view(torch.int16), encoder.encode(frames).view(torch.int16)
        )
