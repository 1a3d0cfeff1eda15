from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from reference.benchmark_miniatures import make_miniature
from timeviper_platform.evaluation.benchmark_answers import AnswerStatus, BenchmarkAnswer
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion
from timeviper_platform.evaluation.benchmarks.registry import BENCHMARKS, BenchmarkName
from timeviper_platform.evaluation.results.rows import answer_rows
from timeviper_platform.evaluation.results.scores import headline, score_answers, score_lines


def answered(
    question: BenchmarkQuestion,
    text: str,
    *,
    status: AnswerStatus = "ok",
    log_probs: Sequence[float] = (),
    frames: int = 64,
) -> BenchmarkAnswer:
    return BenchmarkAnswer(
        task_hash=question.question_id,
        question=json.dumps(asdict(question)),
        protocol="paper",
        status=status,
        answer=text,
        option_log_probs=tuple(log_probs),
        num_frames=frames,
    )


def _questions(name: BenchmarkName, folder: Path) -> list[BenchmarkQuestion]:
    return BENCHMARKS[name].read(make_miniature(name, folder))


def _scores(name: BenchmarkName, folder: Path, texts: Sequence[str]) -> dict[str, Any]:
    questions = _questions(name, folder)
    answers = [answered(question, text) for question, text in zip(questions, texts, strict=True)]
    return dict(score_answers(name, answers)["protocols"]["paper"]["scorers"])


def test_every_scorer_stands_beside_the_others(tmp_path: Path) -> None:
    texts = ["The answer is A.", "A person walks in. The answer is B.", "C", "(A)", "", "nothing"]
    scorers = _scores("videomme", tmp_path, texts)
    assert list(scorers) == ["official", "strict", "vlmevalkit"]
    accuracy = {name: scorer["metrics"]["accuracy"]["score"] for name, scorer in scorers.items()}
    # 'A person walks in' is A for public scorers, and wrong
    assert accuracy == pytest.approx({"official": 50, "strict": 100 * 4 / 6, "vlmevalkit": 50})
    assert scorers["strict"]["num_unparsable"] == 2
    assert scorers["strict"]["breakdowns"]["duration"]["short"]["score"] == 100
    assert scorers["strict"]["breakdowns"]["duration"]["medium"]["num_questions"] == 3
    assert set(scorers["strict"]["breakdowns"]) == {"duration", "domain", "task_type"}, "one sub-category has no table"


def test_mvbench_leaves_empty_answers_out_of_the_official_score_alone(tmp_path: Path) -> None:
    scorers = _scores("mvbench", tmp_path, ["B", *[""] * 19])
    assert scorers["official"]["metrics"]["M-Avg"]["score"] == 100
    assert scorers["official"]["metrics"]["M-Avg"]["num_questions"] == 1
    assert scorers["strict"]["metrics"]["M-Avg"]["score"] == 5


def test_mlvu_averages_its_tasks_and_gives_every_equal_option_right(tmp_path: Path) -> None:
    # plotQA, 3 x needle, then five tasks
    scorers = _scores("mlvu", tmp_path, ["B", "B", "C", "B", *["A"] * 5])
    strict = scorers["strict"]["metrics"]
    assert strict["M-Avg"]["score"] == pytest.approx(100 * (1 + 2 / 3) / 7)
    assert strict["accuracy"]["score"] == pytest.approx(100 * 3 / 9)
    assert scorers["official"]["metrics"]["accuracy"]["score"] == pytest.approx(100 * 2 / 9), "by the first index"


def test_lvbench_counts_a_question_in_each_of_its_types(tmp_path: Path) -> None:
    strict = _scores("lvbench", tmp_path, ["B", "A"])["strict"]
    assert strict["metrics"]["accuracy"]["score"] == 50
    assert strict["metrics"]["accuracy, once for each question_type"]["score"] == pytest.approx(100 * 2 / 3)
    assert {name: row["score"] for name, row in strict["breakdowns"]["question_type"].items()} == {
        "entity recognition": 100,
        "reasoning": 100,
        "summarization": 0,
    }


def test_videomme_v2_scores_groups_by_their_structure(tmp_path: Path) -> None:
    # [1, 2, 3, 4]: two right in a row; [1, [2, 3], 4]: 3 stands in for 2; relevance: three of four
    texts = [*"GGAG", *"GAGA", *"AGGG"]
    strict = _scores("videomme_v2", tmp_path, texts)["strict"]
    expected = {"000": 25, "001": 100 * 4 / 12, "002": 56.25}
    assert strict["metrics"]["group score"]["score"] == pytest.approx(sum(expected.values()) / 3)
    assert strict["metrics"]["accuracy"]["score"] == pytest.approx(100 * 8 / 12)
    by_type = strict["breakdowns"]["group_type"]
    assert by_type["relevance"]["score"] == 56.25
    assert by_type["logic"]["score"] == pytest.approx((25 + 100 / 3) / 2)
    assert "level" not in strict["breakdowns"], "all groups end at level 3"


def test_a_group_that_lacks_a_question_is_in_the_accuracy_alone(tmp_path: Path) -> None:
    questions = _questions("videomme_v2", tmp_path)
    # the first group is whole; of the second, max_questions left [1, [2, 3], 4] two
    answers = [answered(question, text) for question, text in zip(questions[:6], [*"GGGG", *"GA"], strict=True)]
    strict = score_answers("videomme_v2", answers)["protocols"]["paper"]["scorers"]["strict"]
    assert strict["metrics"]["group score"] | {"interval_95": []} == {
        "score": 100, "num_questions": 1, "interval_95": []
    }  # fmt: skip
    assert strict["metrics"]["accuracy"]["score"] == pytest.approx(100 * 5 / 6)
    alone = score_answers("videomme_v2", answers[4:])["protocols"]["paper"]["scorers"]["strict"]
    assert list(alone["metrics"]) == ["accuracy"]


def test_grounding_reports_both_readings_of_a_threshold(tmp_path: Path) -> None:
    questions = _questions("extremewhen", tmp_path)
    answers = [answered(questions[0], "from 100 to 115 seconds"), answered(questions[1], "130 - 100")]
    scorers = score_answers("extremewhen", answers)["protocols"]["paper"]["scorers"]
    strict, official = scorers["strict"]["metrics"], scorers["official"]["metrics"]
    assert (strict["mIoU"]["score"], official["mIoU"]["score"]) == (25, 75), "the public rule swaps a reversed interval"
    assert (strict["R1@0.5"]["score"], strict["R1>0.5"]["score"]) == (50, 0)


def test_charades_official_score_counts_equal_rows_once(tmp_path: Path) -> None:
    scorers = _scores("charades_sta", tmp_path, ["1 - 2", "24.3 - 30.4", "0 - 12"])
    assert scorers["official"]["metrics"]["mIoU"] | {"interval_95": 0} == {
        "score": 100,
        "interval_95": 0,
        "num_questions": 2,
    }
    assert scorers["strict"]["metrics"]["mIoU"]["score"] == pytest.approx(100 * 2 / 3)


def test_tempcompass_follows_the_owners_rules(tmp_path: Path) -> None:
    # action and speed of multi-choice, yes_no, caption_matching
    scorers = _scores("tempcompass", tmp_path, ["B. running", "the answer is B", "Yes, it runs", "it runs."])
    assert scorers["official"]["metrics"]["accuracy"]["score"] == 75, "a judge would read the second answer"
    assert scorers["strict"]["metrics"]["accuracy"]["score"] == 100
    assert list(scorers) == ["official", "strict"]
    assert scorers["strict"]["breakdowns"]["fine_aspect"]["fine-grained action"]["num_questions"] == 3


def test_windows_and_dense_captions_have_their_metrics(tmp_path: Path) -> None:
    windows = _scores("qvhighlights", tmp_path / "a", ["from 0 to 16, then from 40 to 50 seconds"])["strict"]["metrics"]
    assert windows["mAP@0.5"]["score"] == 100
    assert windows["mAP@0.75"]["score"] == 50
    assert windows["R1@0.7"]["score"] == 100
    text = "at 0.8 - 19.9 seconds, a man sits.\nat 17 - 60 seconds, he runs."
    dense = _scores("activitynet_dense", tmp_path / "b", [text, ""])["strict"]
    assert dense["metrics"]["F1"]["score"] == 50
    assert dense["num_unparsable"] == 1


def test_missing_videos_are_in_no_score_and_failed_questions_are_wrong(tmp_path: Path) -> None:
    questions = _questions("videomme", tmp_path)
    answers = [answered(question, "A", status="no_features") for question in questions[:3]]
    answers += [answered(questions[3], "A"), answered(questions[4], "", status="failed"), answered(questions[5], "C")]
    report = score_answers("videomme", answers)
    found = report["protocols"]["paper"]
    assert (found["num_missing_videos"], found["num_missing"], found["num_failed"]) == (1, 3, 1)
    assert found["scorers"]["strict"]["metrics"]["accuracy"]["score"] == pytest.approx(100 * 2 / 3)
    text = "\n".join(score_lines(report))
    assert "1 videos are not in the feature store, 3 questions in no score" in text
    assert "TimeViper + TransV" in text
    assert headline(report, "paper", "strict") == ("accuracy", found["scorers"]["strict"]["metrics"]["accuracy"])
    assert headline(report, "whole", "strict") is None


@pytest.mark.parametrize("name", ["longvideobench", "egoschema", "mvbench"])
def test_failed_questions_are_wrong_where_public_scorers_guess_or_drop_empty_answers(
    tmp_path: Path, name: BenchmarkName
) -> None:
    questions = _questions(name, tmp_path)
    answers = [answered(question, "", status="failed") for question in questions]
    official = score_answers(name, answers)["protocols"]["paper"]["scorers"]["official"]
    first = next(iter(official["metrics"].values()))
    assert (first["score"], first["num_questions"]) == (0, len(questions))
    assert {row["official"] for row in answer_rows(name, answers)} == {None}


def test_likelihood_is_a_score_of_its_own(tmp_path: Path) -> None:
    questions = _questions("videomme", tmp_path)
    answers = [answered(question, "?", log_probs=(-1.0, -3.0, -2.0, -9.0)) for question in questions]
    scorers = score_answers("videomme", answers)["protocols"]["paper"]["scorers"]
    assert scorers["likelihood"]["metrics"]["accuracy"]["score"] == pytest.approx(100 / 3)
    assert scorers["strict"]["metrics"]["accuracy"]["score"] == 0
    row = answer_rows("videomme", answers)[0]
    assert (row["likelihood"], row["likelihood_score"], row["strict"], row["strict_score"]) == ("A", 1.0, None, 0.0)


def test_short_videos_are_counted_for_the_papers_protocol(tmp_path: Path) -> None:
    question = _questions("videomme", tmp_path)[0]
    report = score_answers("videomme", [answered(question, "A", frames=28)])
    assert "1 answers saw fewer than 32 frames" in "\n".join(score_lines(report))
