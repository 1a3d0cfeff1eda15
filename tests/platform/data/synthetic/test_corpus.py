from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from timeviper_model.layers.tome import merge_tokens
from timeviper_model.weights.vision_tower import load_vision_tower
from timeviper_platform.common import schemas
from timeviper_platform.common.config import load_config
from timeviper_platform.data.synthetic.backgrounds import read_film
from timeviper_platform.data.synthetic.corpus import CorpusConfig, CorpusReport, SceneCounts, make_corpus
from timeviper_platform.data.synthetic.pictures import COLORS
from timeviper_platform.data.synthetic.render import write_video

SMALL = CorpusConfig(
    output="",
    train=SceneCounts(needle=4, order=2, count=2),
    held_out=SceneCounts(needle=3, order=1, count=2),
    num_images=4,
    num_language_samples=16,
    num_long_films=5,
    encoder_steps=4,
    num_workers=1,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CorpusReport]:
    folder = tmp_path_factory.mktemp("synthetic") / "corpus"
    return folder, make_corpus(replace(SMALL, output=str(folder)))


def _frames(path: Path) -> list[tuple[float, np.ndarray]]:
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return [(float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]


def _near(frame: np.ndarray, color: str) -> float:
    """Share of pixels within 40 of the colour in every channel."""
    return float((abs(frame.astype(int) - COLORS[color]) < 40).all(-1).mean())


def _digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "corpus.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_decoded_frames_match_the_truth_table(corpus: tuple[Path, CorpusReport]) -> None:
    folder, _ = corpus
    for video in pq.read_table(folder / "truth.parquet").to_pylist():
        frames = _frames(folder / "videos" / f"{video['media_id']}.mp4")
        assert [pts for pts, _ in frames] == [n / 2 for n in range(48)]
        for appearance in video["appearances"]:
            color = appearance["picture"].split()[0]
            for edge, on in ((appearance["start_seconds"], 1), (appearance["end_seconds"], -1)):
                before = [frame for pts, frame in frames if pts == edge - 0.5]
                at = [frame for pts, frame in frames if pts == edge]
                if before and at:  # a picture may touch the start or end of the video
                    assert on * (_near(at[0], color) - _near(before[0], color)) > 0.04, (video["media_id"], appearance)


def test_tables_have_their_schemas_and_existing_media(corpus: tuple[Path, CorpusReport]) -> None:
    folder, report = corpus
    manifest = pq.read_table(folder / "manifest.parquet")
    schemas.check_version(manifest.schema, schemas.MANIFEST, source="manifest")
    media = {row["media_id"]: row["uri"] for row in manifest.to_pylist()}
    assert all((folder / uri).is_file() for uri in media.values())
    assert len(media) == 8 + 6 + 4
    used = {}
    for name in ("language", "align", "instruct", "long_films"):
        table = pq.read_table(folder / "samples" / f"{name}.parquet")
        schemas.check_version(table.schema, schemas.SAMPLES, source=name)
        rows = table.to_pylist()
        assert len({row["sample_id"] for row in rows}) == len(rows) == report.num_samples[name]
        used[name] = {medium["media_id"] for row in rows for medium in row["media"]}
        assert used[name] <= set(media)
    assert used["language"] == set()
    assert report.num_samples["long_films"] == 5
    assert used["long_films"] <= used["instruct"]
    assert used["instruct"] == {media_id for media_id in media if media_id.startswith("train-")}
    held_out = pq.read_table(folder / "samples" / "held_out.parquet")
    schemas.check_version(held_out.schema, schemas.SAMPLES, source="held_out")
    shown = {medium["media_id"] for media in held_out["media"].to_pylist() for medium in media}
    assert shown
    assert all(media_id.startswith("held-out-") for media_id in shown)
    for name, number in {"choice": 3, "order": 2, "count": 2, "grounding": 3, "caption": 6}.items():
        table = pq.read_table(folder / "held_out" / f"{name}.parquet")
        schemas.check_version(table.schema, schemas.QUESTIONS, source=name)
        rows = table.to_pylist()
        assert len(rows) == number == report.num_questions[name]
        assert all(medium["media_id"].startswith("held-out-") for row in rows for medium in row["media"])
        assert all((row["answer"] in row["choices"]) == (name not in ("grounding", "caption")) for row in rows)


def test_a_finished_corpus_is_reused_and_an_unfinished_one_is_regenerated(corpus: tuple[Path, CorpusReport]) -> None:
    folder, first = corpus
    config = replace(SMALL, output=str(folder))
    before = _digests(folder)
    assert not first.reused
    assert make_corpus(config) == replace(first, reused=True)
    (folder / "corpus.json").unlink()
    next((folder / "videos").iterdir()).write_bytes(b"cut off")
    again = make_corpus(config)
    assert not again.reused
    assert _digests(folder) == before  # the same seed gives the same bytes: videos, tables, tokenizer, encoder


def test_a_folder_of_other_files_is_not_cleared(tmp_path: Path) -> None:
    for name in ("videos", "samples"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own").touch()
    with pytest.raises(ValueError, match="holds files that were not generated, and could be deleted"):
        make_corpus(replace(SMALL, output=str(tmp_path)))
    assert len(list(tmp_path.rglob("own"))) == 2


def test_another_seed_gives_another_corpus(corpus: tuple[Path, CorpusReport], tmp_path: Path) -> None:
    folder, _ = corpus
    make_corpus(replace(SMALL, output=str(tmp_path / "other"), seed=1, num_workers=2))
    name = "videos/train-needle-00000.mp4"
    assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()


def test_features_of_the_saved_encoder_are_centred_with_unit_scale(corpus: tuple[Path, CorpusReport]) -> None:
    folder, _ = corpus
    encoder = load_vision_tower(str(folder / "encoder"))
    frames = [
        np.asarray(Image.fromarray(frame).resize((64, 64), Image.Resampling.BICUBIC))
        for path in sorted((folder / "videos").glob("train-*"))
        for _, frame in _frames(path)[::8]
    ]
    features = encoder(encoder.preprocess(torch.from_numpy(np.stack(frames))))
    assert features.shape[1:] == (16, 64)
    assert features.mean().abs() < 0.1
    assert 0.8 < features.square().mean() < 1.25
    assert merge_tokens(features, 4, num_heads=4).shape == (len(frames), 4, 64)


def test_film_backgrounds_of_the_splits_share_no_segment(tmp_path: Path) -> None:
    # every 6 s segment has its own brightness, 20 apart
    film = tmp_path / "film.mp4"
    write_video(film, (np.full((64, 64, 3), 30 + 20 * (n // 24), np.uint8) for n in range(48 * 4)), side=64, fps=4)
    config = replace(SMALL, output=str(tmp_path / "corpus"), film=str(film), film_share=1.0)
    make_corpus(config)
    segments: dict[str, set[int]] = {"train": set(), "held_out": set()}
    for video in pq.read_table(tmp_path / "corpus" / "truth.parquet").to_pylist():
        assert all(name.startswith("film:") for name in video["background_segments"])
        shown = video["appearances"]
        for pts, frame in _frames(tmp_path / "corpus" / "videos" / f"{video['media_id']}.mp4"):
            if not any(a["start_seconds"] <= pts < a["end_seconds"] for a in shown):
                segments[video["split"]].add(round((float(frame.mean()) - 30) / 20))
    assert segments["held_out"] == {3, 7}
    assert segments["train"] <= {0, 1, 2, 4, 5, 6}
    assert len(segments["train"]) >= 3


def test_unusable_films_and_folders_are_refused(tmp_path: Path) -> None:
    config = replace(SMALL, output=str(tmp_path / "corpus"))
    with pytest.raises(ValueError, match=r"none\.mp4.* does not exist"):
        make_corpus(replace(config, film=str(tmp_path / "none.mp4")))
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="cannot cut backgrounds from"):
        read_film(tmp_path / "text.mp4", 4, 64)
    write_video(tmp_path / "short.mp4", (np.zeros((64, 64, 3), np.uint8) for _ in range(8)), side=64, fps=4)
    with pytest.raises(ValueError, match=r"2 s long; backgrounds need 48 s"):
        read_film(tmp_path / "short.mp4", 4, 64)
    with pytest.raises(ValueError, match="must be a local folder"):
        make_corpus(replace(config, output="s3://bucket/corpus"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("which_per_video", -1), ("duration_seconds", 12), ("side", 33), ("fps", 0), ("film_share", 1.5)],
)
def test_impossible_sizes_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(SMALL, **{field: value})


def test_the_demo_configuration_loads() -> None:
    root = Path(__file__).parents[4]
    config = load_config(CorpusConfig, root / "ray_configs" / "tiny" / "corpus.yaml")
    assert config == CorpusConfig(output="outputs/demo/corpus")
    assert config.held_out.needle >= 400
    assert json.dumps(config.train.by_kind()) == '{"needle": 1000, "order": 600, "count": 400}'
