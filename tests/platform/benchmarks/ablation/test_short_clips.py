from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from reference.toy_demo import make_toy_demo
from timeviper_platform.benchmarks.ablation.short_clips import ShortClips, ShortClipsConfig, make_short_clips
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.synthetic.generated import mark_generated
from timeviper_platform.data.synthetic.pictures import ALL_PICTURES

CONFIG = ShortClipsConfig(num_train=12, num_held_out=6)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def corpus(demo: Path) -> ShortClips:
    return make_short_clips(demo.parent / "clips", demo, CONFIG)


def test_a_picture_appears_for_1_or_2_seconds_where_the_answer_says(corpus: ShortClips) -> None:
    store = FeatureStore.open(corpus.features)
    questions = pq.read_table(Path(corpus.questions) / "grounding.parquet").to_pylist()
    lengths = set()
    for question in questions:
        media_id = question["media"][0]["media_id"]
        features_FND = store.read(media_id).features
        assert features_FND.shape[:2] == (30, 1)
        shown_F = features_FND[:, 0, 0] >= 0  # the toy's backgrounds are -1, picture n is n
        start, end = int(question["start_seconds"]), int(question["end_seconds"])
        assert shown_F.nonzero().squeeze(1).tolist() == list(range(start, end))
        picture = ALL_PICTURES[int(features_FND[start, 0, 0])]
        assert question["question"] == f"When does the {picture} appear?"
        lengths.add(end - start)
    assert lengths == {1, 2}


def test_training_and_held_out_frames_stay_apart(corpus: ShortClips) -> None:
    store = FeatureStore.open(corpus.features)
    # channel 1 of the toy's frames is the split
    splits = {media_id.partition("-needle")[0]: set[float]() for media_id in store.media_ids}
    for media_id in store.media_ids:
        splits[media_id.partition("-needle")[0]] |= set(store.read(media_id).features[:, 0, 1].tolist())
    assert splits == {"train": {0.0}, "held-out": {1.0}}


def test_a_video_has_one_background_and_one_token_is_the_mean_of_the_demos(corpus: ShortClips) -> None:
    store = FeatureStore.open(corpus.features)
    for media_id in store.media_ids:
        features_FD = store.read(media_id).features[:, 0]
        free_FD = features_FD[features_FD[:, 0] < 0]
        assert len(free_FD[:, 2].unique()) == 1
        assert torch.all(free_FD[:, 3] == 1.5)  # of tokens 0, 1, 2 and 3
    assert store.recipe["merge"]["num_tokens_per_frame"] == 1


def test_every_training_video_has_two_conversations(corpus: ShortClips) -> None:
    samples = pq.read_table(corpus.samples).to_pylist()
    assert len(samples) == 2 * CONFIG.num_train
    assert {sample["source"] for sample in samples} == {"choice", "grounding", "caption"}


def test_a_finished_corpus_is_reused_and_another_configuration_replaces_it(demo: Path, tmp_path: Path) -> None:
    make_short_clips(tmp_path / "clips", demo, CONFIG)
    index = tmp_path / "clips" / "samples.parquet"
    written = index.stat().st_mtime_ns
    make_short_clips(tmp_path / "clips", demo, CONFIG)
    assert index.stat().st_mtime_ns == written
    corpus = make_short_clips(tmp_path / "clips", demo, ShortClipsConfig(num_train=4, num_held_out=2))
    assert pq.read_metadata(corpus.samples).num_rows == 8


def test_a_folder_without_a_demo_and_a_missing_picture_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not the folder of a demo.*run `timeviper demo`"):
        make_short_clips(tmp_path / "clips", tmp_path, CONFIG)
    demo = make_toy_demo(tmp_path / "few", pictures=ALL_PICTURES[:1])
    with pytest.raises(ValueError, match=r"the demo.s train videos do not show a .*; run a whole demo"):
        make_short_clips(tmp_path / "clips", demo, CONFIG)


def test_a_folder_of_other_files_is_not_cleared(demo: Path) -> None:
    """The corpus of the demo itself, if its folder is that of the ablation too."""
    mark_generated(demo / "corpus", "corpus.json")
    before = sorted(demo.rglob("*"))
    with pytest.raises(ValueError, match="corpus holds files that were not generated"):
        make_short_clips(demo / "corpus", demo, CONFIG)
    assert sorted(demo.rglob("*")) == before
