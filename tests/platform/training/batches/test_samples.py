from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reference.training_corpus import NUM_TOKENS_PER_FRAME, Corpus, sample_row, write_samples
from timeviper_model.batching.batch import IGNORE_INDEX
from timeviper_model.batching.prompt import TimeText
from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.common.schemas import SAMPLES
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches.rows import SampleRows, SourceConfig
from timeviper_platform.training.batches.samples import FramesConfig, SampleBuilder, TokenizedSample
from timeviper_platform.training.batches.sizes import count_rejects, measure_samples

ANSWERED = [("user", "Which picture appears?"), ("assistant", "red circle (B)")]


def builder_of(corpus: Corpus, frames: FramesConfig | None = None) -> SampleBuilder:
    return SampleBuilder(
        FeatureStore.open(corpus.features), load_tokenizer(corpus.tokenizer), "nemotron", frames or FramesConfig()
    )


def test_a_sample_takes_at_most_max_frames_of_its_clip(corpus: Corpus) -> None:
    row = sample_row(0, [("video-5", 1.0, 7.0)], ANSWERED)  # 8 frames at 0..7 s
    built = builder_of(corpus, FramesConfig(max_frames=3)).build(row)
    assert isinstance(built, TokenizedSample)
    assert built.frames[0] in ([1, 4, 6], [1, 3, 6])
    assert built.sample.num_vision_tokens == 3 * NUM_TOKENS_PER_FRAME
    assert built.num_frames == 3


def text_of(corpus: Corpus, row: dict[str, Any], time_text: TimeText) -> str:
    built = builder_of(corpus, FramesConfig(max_frames=2, time_text=time_text)).build(row)
    assert isinstance(built, TokenizedSample)
    return str(load_tokenizer(corpus.tokenizer).decode(built.sample.input_ids))


def test_the_length_of_the_clip_is_stated_after_each_video_of_the_chosen_kind(corpus: Corpus) -> None:
    sentence = "The video lasts for {} seconds, and 2 frames are uniformly sampled from it.\n"
    row = sample_row(0, [("video-1", None, None)], ANSWERED)
    assert sentence.format("4.00") + "Which picture" in text_of(corpus, row, "always")
    assert "lasts" not in text_of(corpus, row, "temporal")
    row["kind"] = "temporal"
    assert "lasts" not in text_of(corpus, row, "never")
    assert sentence.format("4.00") + "Which picture" in text_of(corpus, row, "temporal")
    media = [("video-5", 1.0, 3.5), ("video-1", 2.0, 99.0)]
    clips = sample_row(0, media, [("user", "<media>\nOr <media>?"), ANSWERED[1]])
    assert f"{sentence.format('2.50')}Or " in text_of(corpus, clips, "always")
    assert f"{sentence.format('2.00')}?" in text_of(corpus, clips, "always")


def test_files_without_the_column_kind_are_read(corpus: Corpus, tmp_path: Path) -> None:
    rows = [sample_row(0, [], ANSWERED), {**sample_row(1, [], ANSWERED), "kind": "temporal"}]
    pq.write_table(pa.Table.from_pylist(rows[:1], schema=SAMPLES).drop_columns("kind"), tmp_path / "old.parquet")
    write_samples(tmp_path / "new.parquet", rows)
    old, new = (SampleRows.read([SourceConfig(uri=str(tmp_path / name))]) for name in ("old.parquet", "new.parquet"))
    assert old[0]["kind"] is None
    assert (old.has_kind("temporal"), new.has_kind("temporal")) == (False, True)


@pytest.mark.parametrize(
    ("media", "turns", "reason"),
    [
        ([("nowhere", None, None)], ANSWERED, "no_features"),
        ([("video-1", 100.0, 200.0)], ANSWERED, "no_frames"),
        ([("video-1", 3.0, 1.0)], ANSWERED, "bad_media"),
        ([("video-1", None, None)], [("assistant", "first")], "bad_conversation"),
        ([("video-1", None, None)], [("user", "no answer")], "no_targets"),
        ([("video-1", None, None)], [("user", "a"), ("assistant", " \n")], "empty_answer"),
        ([], [*ANSWERED, ("user", "a"), ("assistant", "")], "empty_answer"),
        ([("video-1", None, None)], [("user", "a" * 500), ("assistant", "b")], "too_long"),
        ([("video-5", None, None)] * 2, ANSWERED, "too_many_frames"),
    ],
)
def test_unusable_rows_are_counted_with_their_reason(
    corpus: Corpus,
    tmp_path: Path,
    media: list[tuple[str, float | None, float | None]],
    turns: list[tuple[str, str]],
    reason: str,
) -> None:
    good = sample_row(1, [("video-0", None, None)], ANSWERED)
    write_samples(tmp_path / "samples.parquet", [sample_row(0, media, turns), good])
    rows = SampleRows.read([SourceConfig(uri=str(tmp_path))])
    table = measure_samples(rows, builder_of(corpus), max_tokens=300, max_frames=12)
    assert count_rejects(table.rejects) == {reason: 1}
    assert table.rejects[0].sample_id == "sample-0000"
    assert table.row_indices.tolist() == [1]


def test_measured_sizes_equal_those_of_the_tokenized_samples(corpus: Corpus) -> None:
    builder = builder_of(corpus)
    rows = SampleRows.read([SourceConfig(uri=corpus.samples, weight=0.5)])
    table = measure_samples(rows, builder, max_tokens=1000, max_frames=None)
    assert len(table) == 24
    for index, row in enumerate(table.row_indices):
        built = builder.build(rows[int(row)])
        assert isinstance(built, TokenizedSample)
        assert table.num_tokens[index] == len(built.sample)
        assert table.num_vision_tokens[index] == built.sample.num_vision_tokens
        assert table.num_targets[index] == sum(label != IGNORE_INDEX for label in built.sample.labels)
        assert table.weights[index] == 0.5


def test_fingerprint_changes_with_weights_and_frames(corpus: Corpus) -> None:
    def fingerprint(weight: float, max_frames: int) -> str:
        rows = SampleRows.read([SourceConfig(uri=corpus.samples, weight=weight)])
        builder = builder_of(corpus, FramesConfig(max_frames=max_frames))
        return measure_samples(rows, builder, max_tokens=1000, max_frames=None).fingerprint

    assert fingerprint(1.0, 4) == fingerprint(1.0, 4)
    assert len({fingerprint(1.0, 4), fingerprint(2.0, 4), fingerprint(1.0, 3)}) == 3


def test_missing_or_invalid_sample_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there are no samples at '/nowhere/samples.parquet'"):
        SampleRows.read([SourceConfig(uri="/nowhere/samples.parquet")])
    with pytest.raises(ValueError, match="there are no samples at"):
        SampleRows.read([SourceConfig(uri=str(tmp_path))])
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet: schema is not stated, this release reads samples"):
        SampleRows.read([SourceConfig(uri=str(tmp_path / "other.parquet"))])
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"text\.parquet is not a Parquet file"):
        SampleRows.read([SourceConfig(uri=str(tmp_path / "text.parquet"))])


def test_no_usable_sample_at_all_is_an_error_with_the_counts(corpus: Corpus) -> None:
    rows = SampleRows.read([SourceConfig(uri=corpus.samples)])
    with pytest.raises(ValueError, match=r"none of 24 samples can be used: \{'too_long': 24\}"):
        measure_samples(rows, builder_of(corpus), max_tokens=10, max_frames=None)
