"""Official scores equal those of lmms-eval 0.7.3's own functions on the same answers."""

from __future__ import annotations

import ast
import json
import logging
import random
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from reference.benchmark_miniatures import make_miniature
from timeviper_platform.evaluation.benchmark_answers import BenchmarkAnswer
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion
from timeviper_platform.evaluation.benchmarks.registry import BENCHMARKS, BenchmarkName
from timeviper_platform.evaluation.harness.task_files import TASKS
from timeviper_platform.evaluation.results.scores import score_answers
from timeviper_platform.evaluation.scoring.letters import find_letter
from timeviper_platform.evaluation.scoring.spans import find_span

pytestmark = pytest.mark.slow  # installs lmms-eval; the rules' own tests have its answers written down

ANSWERS = (
    "A person walks in. The answer is B.",
    "The answer is D because A and B are wrong",
    "I think B, not A",
    "Best option: C",
    "(B)",
    "b",
    "[LMMS_EVAL_REQUEST_FAILED after 5 retries] timeout",
    "Failed to obtain answer via API.",
    "",
    "A",
    "B.",
    "C)",
    "D: a fish",
    "(D) a fish",
    "a cat",
    "B. a cat",
    "The best answer is (C).",
    "The correct option is C",
    "My answer is A. On reflection, B",
    "**C**",
    "**Answer**: D",
    "Final Answer: G",
    "Answer:\nB",
    "Option: D",
    "It is E.",
    "The answer is F",
    "H",
    "I choose D",
    "答案是C",
    "정답은 B",
    "ABCD",
    "A, B and C",
    "Not A.",
    "a bird, maybe a fish",
    "thing 6",
    "The animal in this video is clearly a bird in a tree",
    "yes",
    "No, it does not.",
    "Sentence B: it runs.",
    "Sentence A",
    "it runs.",
    "B. running",
    "'B'",
    "1,000 dogs; (A) or (B)?",
)
SPAN_ANSWERS = (
    "The event happens in 24.3 - 30.4 seconds.",
    "From 5 to 3 seconds",
    "1 - 2, then 3 - 4",
    "Start: 3. End: 7",
    "It starts at 00:03. It ends at 00:09!",
    "0:15-0:19",
    "1:02:03 - 1:02:09",
    "10 to 20",
    "between 3 and 7",
    "12–15",
    "12 ~ 15",
    "7",
    "none",
    "",
    "24.3 - 30.4",
    "100 - 115",
    "A specific example is : 20.8 - 30.0 seconds",
)


@pytest.fixture(scope="session")
def lmms_eval(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SimpleNamespace]:
    """Executes the functions and constants of a module that need only the standard library."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    if subprocess.run([*pip, "--dest", str(folder), "lmms-eval==0.7.3"], capture_output=True).returncode:
        pytest.skip("lmms-eval 0.7.3 cannot be downloaded")
    wheel = zipfile.ZipFile(next(folder.glob("*.whl")))

    def load(module: str) -> SimpleNamespace:
        source = wheel.read(f"lmms_eval/tasks/{module}.py").decode()
        names: dict[str, Any] = {"eval_logger": logging.getLogger("lmms_eval"), "__name__": module}
        for node in ast.parse(source).body:
            try:
                exec(compile(ast.Module([node], []), module, "exec"), names)
            except Exception:  # noqa: BLE001 - reads of files and imports of packages that the functions do not need
                continue
        return SimpleNamespace(names=names, **{name: value for name, value in names.items() if name.isidentifier()})

    return load


def _mcq(lmms_eval: Callable[[str], SimpleNamespace]) -> Callable[..., str]:
    return lmms_eval("_task_utils/mcq_extract").extract_mcq_answer  # type: ignore[no-any-return]


def _with_mcq(module: SimpleNamespace, extract: Callable[..., str]) -> SimpleNamespace:
    """The functions import `extract_mcq_answer` inside."""
    module.names["extract_characters_regex"] = lambda text: extract(text, choices=["A", "B", "C", "D"])
    return module


_Asked = tuple[list[BenchmarkQuestion], list[BenchmarkAnswer]]


def _asked(name: BenchmarkName, folder: Path, texts: Sequence[str]) -> _Asked:
    """As many questions as answers, made from the miniature's in turn; each is a video of its own.

    Neighbours have equal keys, so that the last of them counts where rows are keyed.
    """
    made = BENCHMARKS[name].read(make_miniature(name, folder))
    questions = [
        replace(
            question := made[number % len(made)],
            question_id=f"{number}-{question.question_id}",
            clip=replace(question.clip, path=f"{number}.mp4"),
            details={**question.details, "key": f"{number // 2}>>>{question.details.get('key')}"},
        )
        for number in range(len(texts))
    ]
    answers = [
        BenchmarkAnswer(
            task_hash=q.question_id, question=json.dumps(asdict(q)), protocol="paper", status="ok", answer=text
        )
        for q, text in zip(questions, texts, strict=True)
    ]
    return questions, answers


def _official(name: BenchmarkName, answers: Sequence[BenchmarkAnswer]) -> dict[str, float]:
    metrics = score_answers(name, answers)["protocols"]["paper"]["scorers"]["official"]["metrics"]
    return {metric: row["score"] for metric, row in metrics.items()}


def test_letters_equal_those_of_the_shared_extractor(lmms_eval: Any) -> None:
    extract = _mcq(lmms_eval)
    assert len(ANSWERS) >= 40
    for answer in ANSWERS:
        assert (find_letter("lmms_eval", answer, "abcd") or "") == extract(answer, choices=list("ABCD")), answer


def test_videomme_lvbench_and_mlvu(lmms_eval: Any, tmp_path: Path) -> None:
    extract = _mcq(lmms_eval)
    questions, answers = _asked("videomme", tmp_path / "videomme", ANSWERS)
    module = _with_mcq(lmms_eval("videomme/utils"), extract)
    rows = [
        module.videomme_process_results(
            {
                "answer": question.answers[0],
                "domain": question.groups["domain"][0],
                "sub_category": question.groups["sub_category"][0],
                "task_type": question.groups["task_type"][0],
                "duration": question.groups["duration"][0],
                "question_id": question.question_id,
                "videoID": "",
            },
            [answer.answer],
        )["videomme_perception_score"]
        for question, answer in zip(questions, answers, strict=True)
    ]
    expected = module.videomme_aggregate_results(rows)
    assert 0 < expected < 100
    assert _official("videomme", answers)["accuracy"] == pytest.approx(expected, abs=1e-9)

    questions, answers = _asked("lvbench", tmp_path / "lvbench", ANSWERS)
    module = _with_mcq(lmms_eval("lvbench/utils"), extract)
    right = [
        module.lvbench_process_results({"answer": question.answers[0]}, [answer.answer])["lvbench_score"]
        for question, answer in zip(questions, answers, strict=True)
    ]
    assert _official("lvbench", answers)["accuracy"] == pytest.approx(100 * sum(right) / len(right), abs=1e-9)

    questions, answers = _asked("mlvu", tmp_path / "mlvu", ANSWERS)
    module = _with_mcq(lmms_eval("mlvu/utils"), extract)
    rows = [
        module.mlvu_process_results(
            {"answer": (question.answers or ("none",))[0], "task_type": question.groups["task"][0], "question": ""},
            [answer.answer],
        )["mlvu_percetion_score"]
        for question, answer in zip(questions, answers, strict=True)
    ]
    expected = module.mlvu_aggregate_results_dev(rows)
    assert _official("mlvu", answers)["M-Avg"] == pytest.approx(expected, abs=1e-9)


def test_the_task_files_of_timeviper_synth_score_as_official(lmms_eval: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = runpy.run_path(str(TASKS / "utils.py"))
    module = ModuleType("lmms_eval.tasks._task_utils.mcq_extract")
    module.extract_mcq_answer = _mcq(lmms_eval)  # type: ignore[attr-defined]
    for name in ("lmms_eval", "lmms_eval.tasks", "lmms_eval.tasks._task_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    options = ["A. a dog", "B. a cat", "C. a bird", "D. a fish"]
    answered = [answer for answer in ANSWERS if not answer.startswith("[LMMS_EVAL_")]
    for answer in (*answered, "a cat", "A cat.", "a fish", "two cats"):
        found = utils["find_letter"](answer, options)
        assert found == find_letter("synth", answer, options), answer
        rows = utils["choice_results"]({"task": "count", "options": options, "answer": "B"}, [answer])
        assert rows == {"accuracy": found == "B", "accuracy_count": found == "B", "unparsable": found is None}
    assert utils["find_letter"]("[LMMS_EVAL_REQUEST_FAILED after 5 retries] D.", options) is None
    doc = {"span": [10.0, 20.0]}
    assert utils["grounding_results"](doc, ["From 15 to 25 seconds."]) == {
        "mIoU": pytest.approx(1 / 3),
        "R1@0.5": 0.0,
        "unparsable": 0.0,
    }
    assert utils["grounding_results"](doc, ["20 - 10"])["mIoU"] == 0.0
    assert utils["grounding_results"](doc, ["never"])["unparsable"] == 1.0


def test_mvbench(lmms_eval: Any, tmp_path: Path) -> None:
    module = lmms_eval("mvbench/utils")
    for answer in ANSWERS:
        found = [letter for letter in "ABCDE" if module.mcq_acc(letter, answer)]
        assert found == [letter for letter in [find_letter("lmms_eval_mvbench", answer, "abcde")] if letter], answer
    questions, answers = _asked("mvbench", tmp_path, ANSWERS)
    by_task: dict[str, list[Any]] = {}
    for question, answer in zip(questions, answers, strict=True):
        doc = {"candidates": list(question.options), "answer": "a cat"}
        row = module.mvbench_process_results(doc, [answer.answer])["mvbench_accuracy"]
        by_task.setdefault(question.groups["task"][0], []).append(row)
    means = [module.mvbench_aggregate_results(rows) for rows in by_task.values()]
    assert _official("mvbench", answers)["M-Avg"] == pytest.approx(sum(means) / len(means), abs=1e-9)


def test_videomme_v2(lmms_eval: Any, tmp_path: Path) -> None:
    module = lmms_eval("videomme_v2/utils")
    made = BENCHMARKS["videomme_v2"].read(make_miniature("videomme_v2", tmp_path))
    rng = random.Random(0)
    rows, answers = [], []
    for repeat in range(20):
        for question in made:
            text = rng.choice([*ANSWERS, "G", "G", "G", "G", "(G)", "thing 6", "The answer is G."])
            number = question.question_id.rpartition("-")[2]
            group = f"{repeat}/{question.details['group']}"
            asked = replace(question, question_id=f"{group}-{number}", details={**question.details, "group": group})
            doc = {
                "video_id": group,
                "question_id": asked.question_id,
                "options": "\n".join(f"{letter}. {o}" for letter, o in zip("ABCDEFGH", asked.options, strict=True)),
                "answer": "G",
                "group_structure": asked.details["group_structure"],
                **{name: value[0] for name, value in asked.groups.items()},
            }
            rows.append(module.videomme_v2_process_results(doc, [text])["videomme_v2_overall_score"])
            answers.append(
                BenchmarkAnswer(
                    task_hash=asked.question_id,
                    question=json.dumps(asdict(asked)),
                    protocol="paper",
                    status="ok",
                    answer=text,
                )
            )
    expected = module._compute_all_subscores(rows)
    found = score_answers("videomme_v2", answers)["protocols"]["paper"]["scorers"]["official"]
    assert 0 < expected["overall_score"] < 100
    assert found["metrics"]["group score"]["score"] == pytest.approx(expected["overall_score"], abs=1e-9)
    assert found["metrics"]["accuracy"]["score"] == pytest.approx(expected["overall_acc"], abs=1e-9)
    for group_type in ("relevance", "logic"):
        score = found["breakdowns"]["group_type"][group_type]["score"]
        assert score == pytest.approx(expected[f"{group_type}_score"], abs=1e-9)


def test_letters_that_are_not_drawn_equal_longvideobenchs_and_egoschemas(lmms_eval: Any) -> None:
    longvideobench, egoschema = lmms_eval("longvideobench/utils"), lmms_eval("egoschema/utils")
    options = ["A. a dog", "B. a cat", "C. a bird", "D. a fish", "E. x"]
    by_letter = dict(zip("ABCDE", options, strict=True))
    undrawn = SimpleNamespace(choice=lambda letters: None)
    longvideobench.names["random"] = egoschema.names["random"] = undrawn
    egoschema.names["np"] = SimpleNamespace(argmin=lambda values: values.index(min(values)))
    num_compared = 0
    for answer in ANSWERS:
        expected = longvideobench.parse_multi_choice_response(answer, list("ABCDE"), {})
        if expected is not None:
            assert find_letter("lmms_eval_longvideobench", answer, options) == expected, answer
            num_compared += 1
        try:
            expected, _ = egoschema.parse_multi_choice_response(answer, list("ABCDE"), by_letter)
        except AttributeError:
            continue  # nothing was drawn
        if expected is not None:
            assert find_letter("lmms_eval_egoschema", answer, options) == expected, answer
            num_compared += 1
    assert num_compared > 40


def test_tempcompass(lmms_eval: Any, tmp_path: Path) -> None:
    module = lmms_eval("tempcompass/utils")
    module.names["get_eval_result"] = lambda prompt: ("no judge", 0)
    texts = [text for text in ANSWERS for _ in range(4)]  # each of the four questions gets every answer
    questions, answers = _asked("tempcompass", tmp_path, texts)
    functions = {
        "multi-choice": module.tempcompass_process_results_multi_choice,
        "yes_no": module.tempcompass_process_results_yes_no,
        "caption_matching": module.tempcompass_process_results_caption_matching,
    }
    separators = {"multi-choice": ". ", "caption_matching": ": ", "yes_no": ""}
    ratings = []
    for question, answer in zip(questions, answers, strict=True):
        task = question.details["tempcompass"]
        lines = [f"{a}{separators[task]}{b}" for a, b in zip(question.labels, question.options, strict=True)]
        text = question.text if task == "yes_no" else "\n".join([question.text, *lines])
        doc = {"question": text, "answer": question.details["answer"], "video_id": "", "dim": "action"}
        ratings.append(functions[task](doc, [answer.answer])["avg_accuracy"]["rating"])
    assert 0 < sum(ratings) < len(ratings)
    assert _official("tempcompass", answers)["accuracy"] == pytest.approx(100 * sum(ratings) / len(ratings), abs=1e-9)


def test_grounding(lmms_eval: Any, tmp_path: Path) -> None:
    charades, timelens, extremewhen = (
        lmms_eval(f"{name}/utils") for name in ("charades_sta", "timelens", "extremewhenbench")
    )
    for answer in SPAN_ANSWERS:
        for rule, times in (
            ("lmms_eval_charades", charades.extract_time(answer)),
            ("lmms_eval_timelens", timelens.extract_time(answer)),
            ("lmms_eval_extremewhen", [found] if (found := extremewhen._parse_interval(answer)) else []),
        ):
            span = find_span(rule, answer)  # type: ignore[arg-type]
            assert (None if span is None else tuple(span)) == (tuple(times[0]) if times else None), (rule, answer)

    _, answers = _asked("charades_sta", tmp_path / "a", SPAN_ANSWERS)
    keyed = [{answer.asked().details["key"]: answer.answer} for answer in answers]
    expected = charades._temporal_grounding_compute_metrics(keyed)
    _compare_times(_official("charades_sta", answers), expected)
    _, answers = _asked("timelens", tmp_path / "b", SPAN_ANSWERS)
    keyed = [{answer.asked().details["key"]: answer.answer} for answer in answers]
    _compare_times(_official("timelens", answers), timelens._timelens_compute_metrics(keyed))
    questions, answers = _asked("extremewhen", tmp_path / "c", SPAN_ANSWERS)
    records = [
        extremewhen.ewb_process_results(
            {"qid": "", "video_id": "", "source_corpus": "", "correct_interval": question.spans[0]},
            [answer.answer],
        )["ewb_mIoU"]
        for question, answer in zip(questions, answers, strict=True)
    ]
    found = _official("extremewhen", answers)
    assert found["mIoU"] == pytest.approx(100 * extremewhen.ewb_aggregate_miou(records), abs=1e-9)
    assert found["R1@0.5"] == pytest.approx(100 * extremewhen.ewb_aggregate_r05(records), abs=1e-9)


def _compare_times(found: dict[str, float], expected: dict[str, float]) -> None:
    assert 0 < expected["mIOU"] < 100
    assert found["mIoU"] == pytest.approx(expected["mIOU"], abs=1e-9)
    for number, threshold in ((3, 0.3), (5, 0.5), (7, 0.7)):
        assert found[f"R1@{threshold}"] == pytest.approx(expected[f"IOU@{number}"], abs=1e-9)
