from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reference.benchmark_miniatures import MINIATURES, make_miniature, write_json, write_parquet
from timeviper_platform.data.media.medium import media_id_of
from timeviper_platform.evaluation.benchmarks.annotation_files import AnnotationError
from timeviper_platform.evaluation.benchmarks.options import split_options
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion, Clip, question_of
from timeviper_platform.evaluation.benchmarks.registry import BENCHMARKS, BenchmarkName
from timeviper_platform.evaluation.scoring.spans import Span


def _read(name: BenchmarkName, folder: Path, **options: Any) -> list[BenchmarkQuestion]:
    return BENCHMARKS[name].read(make_miniature(name, folder), **options)


@pytest.mark.parametrize("name", MINIATURES)
def test_a_miniature_in_the_owners_layout_is_read(name: BenchmarkName, tmp_path: Path) -> None:
    questions = _read(name, tmp_path)
    assert len(questions) == MINIATURES[name][1]
    assert len({question.question_id for question in questions}) == len(questions)
    for question in questions:
        assert question_of(json.loads(json.dumps(asdict(question)))) == question
        assert not question.clip.path.startswith("/")


def test_every_benchmark_has_a_miniature() -> None:
    assert set(MINIATURES) == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_data_set_names_the_file_and_the_key(name: BenchmarkName, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)" + str(tmp_path) + ".*set benchmark.folder"):
        BENCHMARKS[name].read(str(tmp_path))


def _edit_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


def _edit_parquet(path: Path, **changes: Any) -> None:
    rows = pq.read_table(path).to_pylist()
    rows[-1] |= changes
    write_parquet(path, rows)


def test_a_wrong_field_is_named_with_its_file_and_row(tmp_path: Path) -> None:
    make_miniature("videomme", tmp_path / "a")
    _edit_parquet(tmp_path / "a" / "videomme" / "test-00000-of-00001.parquet", answer="E")
    with pytest.raises(AnnotationError, match=r"-00001.parquet row 5: field 'answer' is 'E', not one of 4"):
        BENCHMARKS["videomme"].read(str(tmp_path / "a"))
    make_miniature("longvideobench", tmp_path / "b")
    _edit_json(tmp_path / "b" / "lvb_val.json", lambda rows: rows[1].pop("question_category"))
    with pytest.raises(AnnotationError, match=r"lvb_val.json row 1: field 'question_category' is missing, it has id, "):
        BENCHMARKS["longvideobench"].read(str(tmp_path / "b"))
    make_miniature("qvhighlights", tmp_path / "c")
    _edit_json(tmp_path / "c" / "highlight_val_release.jsonl", lambda row: row.update(relevant_windows=[[1]]))
    with pytest.raises(AnnotationError, match=r"row 0: field 'relevant_windows' is \[1\], not a pair of seconds"):
        BENCHMARKS["qvhighlights"].read(str(tmp_path / "c"))
    make_miniature("charades_sta", tmp_path / "d")
    (tmp_path / "d" / "charades_sta_test.txt").write_text("AAAAA 1.0##a person sits.\n")
    with pytest.raises(AnnotationError, match=r"charades_sta_test.txt line 1: 'AAAAA 1.0##a person"):
        BENCHMARKS["charades_sta"].read(str(tmp_path / "d"))
    make_miniature("videomme_v2", tmp_path / "f")
    _edit_parquet(tmp_path / "f" / "test.parquet", group_type="logic", group_structure="[4, 3]")
    with pytest.raises(AnnotationError, match=r"test.parquet row 11: field 'group_structure' is '\[4, 3\]', not"):
        BENCHMARKS["videomme_v2"].read(str(tmp_path / "f"))
    make_miniature("longvideobench", tmp_path / "g")
    _edit_json(tmp_path / "g" / "lvb_val.json", lambda rows: rows[1].update(duration="3 min"))
    with pytest.raises(ValueError, match=r"duration = '3 min' must be seconds"):
        BENCHMARKS["longvideobench"].read(str(tmp_path / "g"))
    make_miniature("mvbench", tmp_path / "e")
    (tmp_path / "e" / "json" / "scene_transition.json").write_text('{"video": ')
    with pytest.raises(AnnotationError, match=r"scene_transition.json"):
        BENCHMARKS["mvbench"].read(str(tmp_path / "e"))


def test_lvbench_leaves_out_questions_without_an_answer_and_keeps_every_type(tmp_path: Path) -> None:
    first, second = _read("lvbench", tmp_path)
    assert first.groups["question_type"] == ("entity recognition", "reasoning")
    assert (first.text, first.options[1], first.answers) == ("Which animal?", "a cat", ("B",))
    assert second.clip.path == "videos/keyB.mp4"


def test_mlvu_matches_answers_by_text(tmp_path: Path) -> None:
    needle = [question for question in _read("mlvu", tmp_path) if question.groups["task"] == ("needle",)]
    assert [question.answers for question in needle] == [("B",), ("B", "C"), ()]
    assert needle[0].clip.path == "MLVU/video/2_needle/needle_1.mp4"
    assert needle[0].duration == "246.5"


def test_mlvu_test_has_six_options(tmp_path: Path) -> None:
    sports, _ = _read("mlvu_test", tmp_path)
    assert (len(sports.options), sports.answers) == (6, ("F",))


def test_mvbench_has_twenty_tasks_five_of_them_about_clips(tmp_path: Path) -> None:
    questions = _read("mvbench", tmp_path)
    clips = {question.groups["task"][0]: question.clip for question in questions}
    assert {name for name, clip in clips.items() if clip.is_part} == {
        *("action_sequence", "action_prediction", "object_interaction", "action_localization", "episodic_reasoning")
    }
    sequence = "video/star/Charades_v1_480/action_sequence.mp4"
    assert clips["action_sequence"] == Clip(path=sequence, start_seconds=1.0, end_seconds=3.0)


def test_charades_ends_are_cut_at_the_length_of_the_file(tmp_path: Path) -> None:
    *_, last = _read("charades_sta", tmp_path)
    assert (last.spans, last.duration) == ((Span(0.0, 11.5),), "11.5")


def test_dense_captions_have_every_annotators_events(tmp_path: Path) -> None:
    both, one = _read("activitynet_dense", tmp_path)
    assert [len(question.details["references"]) for question in (both, one)] == [2, 1]


def test_egoschema_has_the_questions_with_public_answers(tmp_path: Path) -> None:
    assert [question.answers for question in _read("egoschema", tmp_path)] == [("A",), ("E",)]
    _edit_json(tmp_path / "subset_answers.json", lambda answers: answers.update(zzz=1))
    with pytest.raises(AnnotationError, match=r"'zzz' has an answer, but questions.json has no such q_uid"):
        BENCHMARKS["egoschema"].read(str(tmp_path))


def test_a_clips_ids_are_those_of_preprocessing() -> None:
    clip = Clip(path="video/a.mp4", start_seconds=1.5, end_seconds=3.0)
    own, whole = clip.media_ids("mvbench")
    assert own == media_id_of("/data/mvbench/video/a.mp4", "/data", 1.5, 3.0)
    assert whole == media_id_of("/data/mvbench/video/a.mp4", "/data")
    assert Clip(path="video/a.mp4").media_ids("")[0] == media_id_of("/d/video/a.mp4", "/d")


def test_options_are_split_off_in_order() -> None:
    assert split_options("Which?\n(A) a dog\n(B) a cat\nor two") == ("Which?", ("a dog", "a cat\nor two"))
    assert split_options("A. x\nB) y") == ("", ("x", "y"))
    assert split_options("Only text (B) here") == ("Only text (B) here", ())


def test_subtitles_are_refused_where_none_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LVBench ships no subtitles"):
        _read("lvbench", tmp_path, subtitles=True)
