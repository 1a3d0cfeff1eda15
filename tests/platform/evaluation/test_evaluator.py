from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from reference.counted_files import LOG_VARIABLE, reads
from reference.known_answers import (
    NAMES,
    WHEN,
    KnownAnswers,
    choice_row,
    grounding_row,
    span_answer,
    write_questions,
)
from timeviper_model.batching.batch import pack_samples
from timeviper_model.batching.prompt import Turn, build_sample
from timeviper_model.weights import weights_folder as weights
from timeviper_platform.common import storage
from timeviper_platform.common.config import load_config, with_absolute_paths
from timeviper_platform.common.job import JobError
from timeviper_platform.common.lease import LeaseHeldError
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.evaluation.answering import Answerer, Prompt
from timeviper_platform.evaluation.evaluator import AnsweringConfig, Evaluator, read_media
from timeviper_platform.evaluation.outcomes import Outcome, Question, question_hash
from timeviper_platform.evaluation.report import report_lines, summarise
from timeviper_platform.evaluation.run import (
    PATHS,
    EvaluateConfig,
    EvalWorkersConfig,
    check_inputs,
    check_outcomes,
    read_questions,
    run_evaluation,
    run_hash,
    write_report,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def evaluator(known: KnownAnswers) -> Evaluator:
    return Evaluator(
        weights_folder=known.weights, feature_store=known.feature_store, config=AnsweringConfig(max_new_tokens=16)
    )


def _read(config: EvaluateConfig) -> list[dict[str, Any]]:
    return read_questions(config.questions, config.tasks, config.max_questions)


def _rows(folder: KnownAnswers, media_id: str) -> torch.Tensor:
    return FeatureStore.open(folder.feature_store).read(media_id).features.flatten(0, 1)


def test_known_answers_are_found_with_the_video_and_one_in_four_without(evaluator: Evaluator) -> None:
    outcomes = evaluator.evaluate([choice_row(n) for n in range(4)])
    assert [outcome.answer for outcome in outcomes] == list(NAMES)
    assert [outcome.score for outcome in outcomes] == [1.0] * 4
    # without the video, the four questions are the same
    assert len({outcome.answer_without_video for outcome in outcomes}) == 1
    assert sum(outcome.score_without_video for outcome in outcomes) == 1.0
    assert {outcome.chance for outcome in outcomes} == {0.25}


def test_weights_may_be_remote(known: KnownAnswers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG_VARIABLE, str(tmp_path / "log"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    uri = f"counted://{known.weights}"
    check_inputs(uri, known.feature_store)
    for _ in range(2):  # as two workers of a node
        remote = Evaluator(weights_folder=uri, feature_store=known.feature_store, config=AnsweringConfig())
    assert [outcome.answer for outcome in remote.evaluate([choice_row(n) for n in range(4)])] == list(NAMES)
    assert [path.endswith(".safetensors") for path, _ in reads(tmp_path / "log")].count(True) == 1


def test_known_intervals_are_written_with_the_video(evaluator: Evaluator) -> None:
    outcomes = evaluator.evaluate([grounding_row(n) for n in range(4)])
    assert [outcome.answer for outcome in outcomes] == [span_answer(n) for n in range(4)]
    assert [outcome.score for outcome in outcomes] == [1.0] * 4
    assert sum(outcome.score_without_video for outcome in outcomes) < 4


def test_scores_are_the_log_likelihood_of_the_whole_answer(known: KnownAnswers) -> None:
    model, tokenizer = weights.from_pretrained(known.weights), weights.load_tokenizer(known.weights)
    prompts = [Prompt(text="What?", media=(_rows(known, f"video-{n}"),)) for n in range(3)] + [Prompt(text="What?")]
    options = [NAMES, NAMES[:2], (NAMES[3],), NAMES[1:3]]
    for max_pack_tokens in (1, 70, 10_000):  # one pair a pack, some, all
        answerer = Answerer(model, tokenizer, max_pack_tokens=max_pack_tokens)
        scores = answerer.score_options(prompts, options)
        assert [len(row) for row in scores] == [4, 2, 1, 2]
        for prompt, texts, row in zip(prompts, options, scores, strict=True):
            for text, score in zip(texts, row, strict=True):
                turns = [Turn(role="user", text=prompt.text), Turn(role="assistant", text=text)]
                sample = build_sample(tokenizer, turns, [len(rows) for rows in prompt.media])
                features = prompt.media[0].float() if prompt.media else torch.zeros(0, 8)
                output = model(pack_samples([sample], [features]))
                assert score == pytest.approx(-float(output.loss_sum.detach()), abs=1e-4)


def test_answers_together_equal_answers_alone_and_stop_at_the_limit(known: KnownAnswers) -> None:
    answerer = Answerer(weights.from_pretrained(known.weights), weights.load_tokenizer(known.weights))
    prompts = [Prompt(text=WHEN, media=(_rows(known, f"video-{n}"),)) for n in range(4)]
    together = answerer.generate(prompts, max_new_tokens=16)
    assert together == [answerer.generate([prompt], max_new_tokens=16)[0] for prompt in prompts]
    assert together == [span_answer(n) for n in range(4)]
    short = answerer.generate(prompts, max_new_tokens=2)
    assert all(text.startswith(cut) and len(cut) < len(text) for text, cut in zip(together, short, strict=True))


def _media(media_id: str = "video-1", start: float | None = None, end: float | None = None) -> list[dict[str, Any]]:
    return [{"media_id": media_id, "start_seconds": start, "end_seconds": end}]


@pytest.mark.parametrize(
    ("question", "status"),
    [
        (choice_row(2, media=_media("gone")), "no_features"),
        (choice_row(1, media=_media(start=90.0)), "no_frames"),
        (choice_row(1, media=_media(start=3.0, end=1.0)), "bad_times"),
        (choice_row(1, answer="purple (E)"), "answer_is_no_choice"),
        (choice_row(1, choices=["red (A)", None]), "answer_is_no_choice"),
        (grounding_row(0, start_seconds=None, end_seconds=None), "no_answer_format"),
        (grounding_row(0, start_seconds=3.0, end_seconds=2.0), "bad_times"),
        (grounding_row(0, start_seconds=90.0, end_seconds=95.0), "bad_times"),
        (choice_row(1, question="<media><media>"), "failed"),
        (grounding_row(1, question="<media><media>"), "failed"),
    ],
)
def test_a_bad_question_is_one_counted_outcome(evaluator: Evaluator, question: Question, status: str) -> None:
    good = grounding_row(2) if question["source"] == "grounding" else choice_row(2)
    outcomes = evaluator.evaluate([good, question, good])
    assert [outcome.status for outcome in outcomes] == ["ok", status, "ok"]
    assert [outcome.score for outcome in outcomes] == [1.0, 0.0, 1.0]
    assert outcomes[1].detail
    assert summarise(outcomes)[question["source"]]["skipped"] == {status: 1}


def test_a_question_may_place_its_video(evaluator: Evaluator) -> None:
    (outcome,) = evaluator.evaluate([choice_row(1, question="<media>Which picture?")])
    assert (outcome.status, outcome.answer) == ("ok", NAMES[1])


def test_damaged_features_fail_the_questions_about_them(known: KnownAnswers, tmp_path: Path) -> None:
    rows = {name: torch.full((4, 1, 8), value).bfloat16() for name, value in (("video-1", 1.0), ("nan", torch.nan))}
    write_store(str(tmp_path / "store"), rows, recipe={"synthetic": "damaged"})
    evaluator = Evaluator(weights_folder=known.weights, feature_store=str(tmp_path / "store"), config=AnsweringConfig())
    outcomes = evaluator.evaluate([choice_row(1), choice_row(1, media=_media("nan"))])
    assert [outcome.status for outcome in outcomes] == ["ok", "failed"]
    assert "not finite" in outcomes[1].detail


def test_an_answer_without_an_interval_is_scored_0_and_counted(known: KnownAnswers) -> None:
    config = AnsweringConfig(max_new_tokens=1)
    evaluator = Evaluator(weights_folder=known.weights, feature_store=known.feature_store, config=config)
    (outcome,) = evaluator.evaluate([grounding_row(0)])
    assert (outcome.status, outcome.score) == ("unparsable", 0.0)
    report = summarise([outcome])
    assert (report["grounding"]["num_questions"], report["grounding"]["num_unparsable"]) == (1, 1)
    assert "1 unparsable (scored 0)" in "\n".join(report_lines(report))


def test_a_video_is_read_once_for_all_options_and_questions(known: KnownAnswers) -> None:
    model, tokenizer = weights.from_pretrained(known.weights), weights.load_tokenizer(known.weights)

    def lengths(prompt: Prompt) -> tuple[int, int, list[int]]:
        """Tokens up to the end of the video, of the whole prompt, and of each answer."""
        video = [len(rows) for rows in prompt.media]
        user = Turn(role="user", text=prompt.text)
        opened = build_sample(tokenizer, [user], video, add_generation_prompt=True)
        turns = [[user, Turn(role="assistant", text=name)] for name in NAMES]
        answers = [len(build_sample(tokenizer, turn, video)) - len(opened) for turn in turns]
        return opened.vision_index.index(3) + 1 if video else 0, len(opened), answers

    rows = _rows(known, "video-1")
    first = Prompt(text="What?", media=(rows,), media_key="video-1")
    second = Prompt(text="Which one?", media=(rows,), media_key="video-1")
    alone = Answerer(model, tokenizer)
    expected = [alone.score_options([replace(prompt, media_key=None)], [NAMES])[0] for prompt in (first, second)]
    answerer = Answerer(model, tokenizer)
    scores = answerer.score_options([first, second], [NAMES, NAMES])
    assert scores[0] == pytest.approx(expected[0], abs=1e-5)
    assert scores[1] == pytest.approx(expected[1], abs=1e-5)
    (video, one, answers), (_, two, _) = lengths(first), lengths(second)
    assert answerer.num_scored_tokens == one + (two - video) + 2 * sum(count - 1 for count in answers)
    blind = Answerer(model, tokenizer)
    blind.score_options([Prompt(text="What?")], [NAMES])
    assert blind.num_scored_tokens == 4 * (one - 4) + sum(answers)  # without the four vision tokens


def test_a_questions_clip_selects_its_frames(known: KnownAnswers) -> None:
    medium = {"media_id": "video-1", "start_seconds": 1.0, "end_seconds": 3.0}
    store = FeatureStore.open(known.feature_store)
    media = read_media(store, choice_row(1, media=[medium]), AnsweringConfig(), dim=8)
    assert media is not None
    assert torch.equal(media[0], _rows(known, "video-1")[1:3])


def test_features_of_another_encoder_are_refused(known: KnownAnswers, tmp_path: Path) -> None:
    write_store(str(tmp_path / "other"), {"video-1": torch.zeros(4, 1, 16).bfloat16()}, recipe={"synthetic": "wide"})
    other = Evaluator(weights_folder=known.weights, feature_store=str(tmp_path / "other"), config=AnsweringConfig())
    with pytest.raises(ValueError, match="width 16, the weights need 8"):
        other.evaluate([choice_row(1)])


def _outcome(number: int, *, score: float, blind: float = 0.0, **changes: object) -> Outcome:
    outcome = Outcome(
        question_hash=str(number),
        sample_id=f"choice-{number}",
        task="choice",
        video=f"video-{number}",
        status="ok",
        detail="",
        expected="",
        answer="",
        answer_without_video="",
        score=score,
        score_without_video=blind,
        chance=0.25,
    )
    return replace(outcome, **changes)  # type: ignore[arg-type]


def test_kernels_that_cannot_be_used_are_named(known: KnownAnswers) -> None:
    with pytest.raises(RuntimeError, match=r"backend = kernels cannot be used .*need CUDA, not cpu"):
        Evaluator(
            weights_folder=known.weights, feature_store=known.feature_store, config=AnsweringConfig(backend="kernels")
        )


def test_report_has_the_agreed_keys_and_counts() -> None:
    outcomes = [_outcome(n, score=float(n < 90), blind=float(n < 25)) for n in range(100)]
    outcomes += [_outcome(100, score=0.0, status="no_features", chance=None)]
    outcomes += [_outcome(n, score=0.5, blind=0.25, task="grounding", chance=None) for n in range(10)]
    report = summarise(outcomes)
    assert report["choice"] | {"interval_95": 0, "interval_95_without_video": 0} == {
        "accuracy": 0.9,
        "interval_95": 0,
        "chance": 0.25,
        "above_chance": True,
        "accuracy_without_video": 0.25,
        "interval_95_without_video": 0,
        "num_questions": 100,
        "num_skipped": 1,
        "skipped": {"no_features": 1},
    }
    assert report["choice"]["interval_95"] == pytest.approx([0.84, 0.95], abs=0.011)
    assert report["grounding"]["miou"] == 0.5
    assert report["grounding"]["miou_without_video"] == 0.25
    assert report["grounding"]["num_questions"] == 10
    assert not summarise([_outcome(n, score=float(n < 3)) for n in range(10)])["choice"]["above_chance"]
    table = "\n".join(report_lines(report | {"order": {"num_questions": 0, "num_skipped": 4}}))
    assert "0.900" in table
    assert "none of 4 questions could be answered" in table


def _config(known: KnownAnswers, output: Path, **changes: object) -> EvaluateConfig:
    config = EvaluateConfig(
        weights=known.weights,
        feature_store=known.feature_store,
        questions=known.questions,
        output=str(output),
        tasks=("choice", "grounding"),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def test_questions_keep_their_order_and_a_missing_task_is_named(known: KnownAnswers, tmp_path: Path) -> None:
    config = _config(known, tmp_path / "report.json", max_questions=3)
    assert [row["sample_id"] for row in _read(config)] == [
        *(f"choice-{n}" for n in range(3)),
        *(f"grounding-{n}" for n in range(3)),
    ]
    with pytest.raises(ValueError, match=r"task 'order' has no file .*choice\.parquet, grounding\.parquet"):
        _read(replace(config, tasks=("order",)))
    with pytest.raises(ValueError, match="must name each task once"):
        replace(config, tasks=("choice", "choice"))


def test_missing_inputs_are_named_before_anything_starts(known: KnownAnswers, tmp_path: Path) -> None:
    config = _config(known, tmp_path / "report.json")
    check_inputs(config.weights, config.feature_store)
    with pytest.raises(ValueError, match="no weights folder at"):
        check_inputs(str(tmp_path / "none"), config.feature_store)
    with pytest.raises(ValueError, match="no feature store at"):
        check_inputs(config.weights, str(tmp_path / "none"))


def test_report_and_outcomes_are_written_in_the_questions_order(known: KnownAnswers, tmp_path: Path) -> None:
    config = _config(known, tmp_path / "report.json", tasks=("choice",))
    questions = _read(config)
    outcomes = {question_hash(choice_row(n)): _outcome(n, score=float(n < 2)) for n in (3, 1, 0, 2)}
    report = write_report(config, questions, outcomes)
    assert storage.read_json(config.output) == report
    rows = pq.read_table(tmp_path / "report.outcomes.parquet").to_pylist()
    assert [row["sample_id"] for row in rows] == [f"choice-{n}" for n in range(4)]
    outcomes.popitem()
    with pytest.raises(RuntimeError, match="1 of 4 questions have no outcome"):
        write_report(config, questions, outcomes)


class _Killed(BaseException):
    """Ends a run as a signal does."""


class _InProcess:
    """Answers batches of three; may be killed before one of them."""

    def __init__(self, evaluator: Evaluator, killed_before_batch: int | None = None) -> None:
        self._evaluator, self._killed_before_batch = evaluator, killed_before_batch
        self.asked: list[str] = []

    def __call__(self, questions: Sequence[Question], config: EvaluateConfig) -> Iterator[list[Outcome]]:
        for batch, first in enumerate(range(0, len(questions), 3)):
            if batch == self._killed_before_batch:
                raise _Killed
            rows = list(questions[first : first + 3])
            self.asked += [row["sample_id"] for row in rows]
            yield self._evaluator.evaluate(rows)


def test_a_killed_evaluation_goes_on_with_the_questions_that_are_left(
    known: KnownAnswers, evaluator: Evaluator, tmp_path: Path
) -> None:
    config = _config(known, tmp_path / "report.json")
    for asked in (3, 3):
        killed = _InProcess(evaluator, killed_before_batch=1)
        with pytest.raises(_Killed):
            run_evaluation(config, killed)
        assert len(killed.asked) == asked
        assert not (tmp_path / "report.json").exists()
    last = _InProcess(evaluator)
    report = run_evaluation(config, last)
    assert last.asked == ["grounding-2", "grounding-3"]
    assert (report["choice"]["accuracy"], report["grounding"]["miou"]) == (1.0, 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.outcomes.parquet"]


def test_a_second_evaluation_with_the_same_output_is_refused(
    known: KnownAnswers, evaluator: Evaluator, tmp_path: Path
) -> None:
    """It would remove the outcomes of the first, and replace its report."""
    config = _config(known, tmp_path / "report.json")
    first = _InProcess(evaluator)

    def meanwhile(left: Sequence[Question], of: EvaluateConfig) -> Iterator[list[Outcome]]:
        with pytest.raises(LeaseHeldError, match=r"report\.partial is in use by jobs/evaluate\.py"):
            run_evaluation(config, _InProcess(evaluator))
        yield from first(left, of)

    run_evaluation(config, meanwhile)
    assert len(first.asked) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.outcomes.parquet"]


def test_outcomes_of_weights_that_were_exported_again_are_not_taken(
    known: KnownAnswers, evaluator: Evaluator, tmp_path: Path
) -> None:
    """On a local disk a file's version is its time of change."""
    weights = Path(shutil.copytree(known.weights, tmp_path / "weights"))
    config = _config(known, tmp_path / "out" / "report.json", weights=str(weights))
    with pytest.raises(_Killed):
        run_evaluation(config, _InProcess(evaluator, killed_before_batch=1))
    (file,) = weights.glob("*.safetensors")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000))
    again = _InProcess(evaluator)
    run_evaluation(config, again)
    assert len(again.asked) == 8


def test_outcomes_of_other_options_are_not_taken_and_failed_questions_are_asked_again(
    known: KnownAnswers, evaluator: Evaluator, tmp_path: Path
) -> None:
    write_questions(tmp_path / "choice.parquet", [choice_row(n) for n in range(3)])
    bad = choice_row(3, question="<media><media>")
    write_questions(tmp_path / "grounding.parquet", [bad, *(grounding_row(n) for n in range(3))])
    config = _config(known, tmp_path / "report.json", questions=str(tmp_path))
    with pytest.raises(JobError, match="1 of 7 questions failed, choice-3 by ValueError"):
        run_evaluation(config, _InProcess(evaluator))
    again = _InProcess(evaluator)
    with pytest.raises(JobError, match="1 of 7 questions failed"):
        run_evaluation(config, again)
    assert again.asked == ["choice-3"]
    assert storage.read_json(config.output)["grounding"]["skipped"] == {"failed": 1}
    other = replace(config, answering=AnsweringConfig(max_frames=2))
    assert run_hash(other) != run_hash(config) == run_hash(replace(config, answering=AnsweringConfig(num_threads=2)))


def test_an_evaluation_without_a_scored_question_is_an_error(known: KnownAnswers, tmp_path: Path) -> None:
    write_questions(tmp_path / "choice.parquet", [])
    with pytest.raises(ValueError, match="tasks choice have no questions in"):
        run_evaluation(_config(known, tmp_path / "r.json", questions=str(tmp_path), tasks=("choice",)))
    check_outcomes([_outcome(0, score=0.0), _outcome(1, score=0.0, status="no_frames", detail="no frame")])
    with pytest.raises(JobError, match="none of 1 questions could be scored; choice-0: no frame"):
        check_outcomes([_outcome(0, score=0.0, status="no_frames", detail="no frame")])


def test_wrong_settings_are_refused(known: KnownAnswers, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_workers"):
        EvalWorkersConfig(num_workers=0)
    on_gpu = AnsweringConfig(device="cuda:0")
    with pytest.raises(ValueError, match=r"answering.device = 'cuda:0' and workers.gpus_per_worker = 0: every worker"):
        _config(known, tmp_path / "r.json", answering=on_gpu)
    _config(known, tmp_path / "r.json", answering=on_gpu, workers=EvalWorkersConfig(gpus_per_worker=0.5))


def test_workers_get_absolute_paths_and_unchanged_uris(known: KnownAnswers) -> None:
    config = replace(_config(known, Path("scores.json")), weights="outputs/demo/weights", questions="s3://bucket/q")
    absolute = with_absolute_paths(config, PATHS)
    assert absolute.weights == str(Path.cwd() / "outputs/demo/weights")
    assert absolute.output == str(Path.cwd() / "scores.json")
    assert absolute.questions == "s3://bucket/q"


@pytest.mark.parametrize("name", ["evaluate.yaml", "tiny/evaluate.yaml"])
def test_shipped_configurations_load(name: str) -> None:
    assert load_config(EvaluateConfig, ROOT / "ray_configs" / name).workers.batch_size == 16


def test_a_question_file_of_another_schema_is_refused(known: KnownAnswers, tmp_path: Path) -> None:
    write_questions(tmp_path / "choice.parquet", [choice_row(0)])
    table = pq.read_table(tmp_path / "choice.parquet").replace_schema_metadata({"timeviper.schema": "samples"})
    pq.write_table(table, tmp_path / "choice.parquet")
    with pytest.raises(ValueError, match="schema is samples, this release reads questions"):
        _read(_config(known, tmp_path / "r.json", questions=str(tmp_path), tasks=("choice",)))
