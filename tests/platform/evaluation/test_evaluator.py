from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

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
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.evaluation.answering import Answerer, Prompt
from timeviper_platform.evaluation.evaluator import AnsweringConfig, Evaluator, Outcome, read_media
from timeviper_platform.evaluation.report import report_lines, summarise
from timeviper_platform.evaluation.run import (
    PATHS,
    EvaluateConfig,
    EvalWorkersConfig,
    check_inputs,
    read_questions,
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


def test_a_missing_medium_and_a_question_without_truth_are_counted_outcomes(evaluator: Evaluator) -> None:
    gone = [{"media_id": "gone", "start_seconds": None, "end_seconds": None}]
    outcomes = evaluator.evaluate(
        [
            choice_row(1),
            choice_row(2, media=gone),
            grounding_row(0, start_seconds=None, end_seconds=None),
        ]
    )
    assert [outcome.status for outcome in outcomes] == ["ok", "no_features", "no_answer_format"]
    assert outcomes[0].score == 1.0


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
        sample_id=f"choice-{number}",
        task="choice",
        status="ok",
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
    }
    assert report["choice"]["interval_95"] == pytest.approx([0.8256, 0.9448], abs=1e-3)
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
    outcomes = [_outcome(n, score=float(n < 2)) for n in (3, 1, 0, 2)]
    report = write_report(config, questions, outcomes)
    assert storage.read_json(config.output) == report
    rows = pq.read_table(tmp_path / "report.outcomes.parquet").to_pylist()
    assert [row["sample_id"] for row in rows] == [f"choice-{n}" for n in range(4)]
    with pytest.raises(RuntimeError, match="4 questions came back as 3 outcomes"):
        write_report(config, questions, outcomes[:3])


def test_wrong_settings_are_refused(known: KnownAnswers, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_workers"):
        EvalWorkersConfig(num_workers=0)


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
