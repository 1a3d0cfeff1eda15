from __future__ import annotations

import csv
import json
import runpy
import statistics
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.counted_files import LOG_VARIABLE
from reference.known_answers import KnownAnswers, choice_row, grounding_row, write_questions
from reference.small_models import SMALL, SMALL_QWEN, make_model
from timeviper_model.analysis.blocking import Blocking, read_blocked
from timeviper_model.analysis.maps import observe
from timeviper_model.analysis.pooling import pool_map
from timeviper_model.config import TINY, TINY_QWEN
from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.evaluation.analyze import AnalyzeConfig, analyze, run_analysis
from timeviper_platform.evaluation.answering import Answer, Answerer, Prompt
from timeviper_platform.evaluation.evaluator import AnsweringConfig, load_model, read_media
from timeviper_platform.evaluation.figures import reduction
from timeviper_platform.evaluation.figures.curves import CurvesConfig, importance_curves, vision_importance
from timeviper_platform.evaluation.figures.maps import MapsConfig, layer_maps, spread
from timeviper_platform.evaluation.figures.needle import Needle, NeedleConfig, find_needles, needle_rows, place_needle
from timeviper_platform.evaluation.figures.reduction import ReductionConfig, reduction_plans, reduction_rows
from timeviper_platform.evaluation.figures.speed import SpeedConfig, speed_rows
from timeviper_platform.evaluation.figures.sweeps import (
    BlockingSweep,
    DroppingSweep,
    TaskPrompts,
    blocking_rows,
    dropping_rows,
    score_text,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def loaded(known: KnownAnswers) -> tuple[Any, Answerer, list[Any]]:
    """A model with blocks Mamba, attention, MLP; its Answerer; the four choice questions with their prompts."""
    config = AnsweringConfig()
    model = load_model(known.weights, config)
    store = FeatureStore.open(known.feature_store)
    rows = [choice_row(number) for number in range(4)]
    media = [read_media(store, row, config, dim=8) for row in rows]
    prompts = [
        (row, Prompt(text=row["question"], media=rows_of)) for row, rows_of in zip(rows, media, strict=True) if rows_of
    ]
    return model, Answerer(model, load_tokenizer(known.weights), max_pack_tokens=128), prompts


def config_of(known: KnownAnswers, output: Path, **changes: Any) -> AnalyzeConfig:
    values = {
        "weights": known.weights,
        "feature_store": known.feature_store,
        "questions": known.questions,
        "output": str(output),
    }
    maps = MapsConfig(num_questions=2, num_bins=6)
    return replace(AnalyzeConfig(**values, maps=maps, tasks=("choice",)), **changes)


def task_of(prompts: list[Any], name: str = "choice") -> TaskPrompts:
    return TaskPrompts(name, tuple(row for row, _ in prompts), tuple(prompt for _, prompt in prompts))


def test_generated_answers_and_log_probs_equal_those_of_the_evaluation(
    known: KnownAnswers, loaded: tuple[Any, Answerer, list[Any]]
) -> None:
    model, answerer, prompts = loaded
    task = task_of(prompts)
    start = next(blocking_rows(model, answerer, task, BlockingSweep(), max_new_tokens=16))
    assert (start["score"], start["metric"], start["num_questions"]) == (1.0, "accuracy", 4)
    assert start["low"] < 1.0 == pytest.approx(start["high"])
    assert (start["change"], -start["change_low"]) == (0.0, start["change_high"])
    scores = answerer.score_options(list(task.prompts), [[row["answer"]] for row in task.questions])
    tokenizer = load_tokenizer(known.weights)
    expected = []
    for row, (score,) in zip(task.questions, scores, strict=True):
        length = len(tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) + 2  # a new line, the end
        expected.append(score / length)
    assert start["log_prob"] == pytest.approx(sum(expected) / 4, rel=1e-4)


def test_blocking_the_video_everywhere_leaves_a_guess(loaded: tuple[Any, Answerer, list[Any]]) -> None:
    model, answerer, prompts = loaded
    sweep = BlockingSweep(flows=("v2i", "v2r"), scopes=("from_layer",))
    task = task_of(prompts)
    start, *rows = blocking_rows(model, answerer, task, sweep, max_new_tokens=16)
    assert [(row["flow"], row["layer"]) for row in rows] == [("v2i", 0), ("v2i", 1), ("v2r", 0), ("v2r", 1)]
    assert all(row["log_prob"] < start["log_prob"] for row in rows if row["layer"] == 0)
    read = partial(read_blocked, model, blocking=Blocking(flow="v2i", scope="from_layer", layer=0))
    batches = [answerer.prompt_batch(prompt) for prompt in task.prompts]
    texts = answerer.generate_with(read, batches, max_new_tokens=16)
    scores = [score_text(row, text) for row, text in zip(task.questions, texts, strict=True)]
    assert rows[0]["score"] == sum(scores) / 4 < 1.0
    assert rows[0]["change"] == rows[0]["score"] - 1.0
    assert rows[0]["change_low"] <= rows[0]["change"] <= rows[0]["change_high"] <= 0.0


def test_dropping_all_at_the_entrance_is_a_guess_and_none_is_the_model(loaded: tuple[Any, Answerer, list[Any]]) -> None:
    model, answerer, prompts = loaded
    tokenizer = answerer._tokenizer
    start, *rows = dropping_rows(
        model, lambda twin: Answerer(twin, tokenizer), task_of(prompts), DroppingSweep(keep_ratios=(1.0, 0.0)),
        max_new_tokens=16,
    )  # fmt: skip
    keys = [(row["select"], row["keep"], row["layer"]) for row in rows]
    assert keys == [
        ("uniform", 1.0, 0), ("uniform", 1.0, 1), ("uniform", 0.0, 0), ("uniform", 0.0, 1),
        ("attention", 1.0, 1), ("attention", 0.0, 1),
    ]  # fmt: skip
    assert rows[0]["log_prob"] == start["log_prob"]
    assert rows[2]["score"] <= 0.25
    assert start["score"] == 1.0


@pytest.mark.parametrize(
    ("question", "text", "score"),
    [
        (choice_row(0), "Red (A).", 1.0),
        (choice_row(0), "blue (B)", 0.0),
        (grounding_row(0), "From 1 to 3 seconds.", 1 / 3),
        (grounding_row(0), "soon", 0.0),
        (grounding_row(0, start_seconds=None, answer="A red square appears."), "a RED circle appears", 6 / 8),
    ],
)
def test_each_kind_of_answer_has_its_score(question: Any, text: str, score: float) -> None:
    assert score_text(question, text) == pytest.approx(score)


def test_curves_of_importance_are_shares_of_the_vision_tokens(loaded: tuple[Any, Answerer, list[Any]]) -> None:
    model, answerer, prompts = loaded
    batches = [answerer.prompt_batch(prompt) for _, prompt in prompts]
    found = importance_curves(model, batches, CurvesConfig(top_share=0.25))
    assert (found["layers"], found["blocks"]) == ([0, 1], ["mamba", "attention"])
    assert all(0 < half <= most <= 1 for half, most in zip(*found["sparsity"].values(), strict=True))
    assert found["overlap_LL"][0][0] == found["overlap_LL"][1][1] == pytest.approx(1.0)
    assert found["overlap_LL"][0][1] == found["overlap_LL"][1][0]
    assert -1 <= found["correlation_LL"][0][1] <= 1
    by_hand = []
    for batch in batches:
        scores_LV = vision_importance(model, batch, [0, 1])
        by_hand.append(float(scores_LV[0].argmax() == scores_LV[1].argmax()))  # the top quarter of four tokens
    assert found["overlap_LL"][0][1] == pytest.approx(sum(by_hand) / 4)


def test_plans_of_the_reduction_table_keep_equally_many_tokens_at_the_end() -> None:
    for text, trained in ((TINY.text, TINY.transv), (TINY_QWEN.text, TINY_QWEN.transv)):
        plans = reduction_plans(text, trained, None)
        assert list(plans) == ["none", "uniform", "attention", "TransV", "TD", "PDrop", "EVS", "importance"]
        assert plans["TransV"] == trained
        for name, sites in plans.items():
            replace(TINY, text=text, transv=sites)  # a valid plan
            assert name == "none" or sites[-1].keep == 0.25
            assert name == "TransV" or all(site.transfer == "none" for site in sites)
    assert "TransV" not in reduction_plans(TINY.text, TINY.transv, 0.5)
    with pytest.raises(ValueError, match=r"set reduction\.keep"):
        reduction_plans(TINY.text, (), None)
    with pytest.raises(ValueError, match="by attention"):
        reduction_plans(replace(TINY.text, hybrid_override_pattern="M-M-"), (), 0.5)


def test_the_reduction_table_scores_and_times_every_plan(loaded: tuple[Any, Answerer, list[Any]]) -> None:
    model, answerer, prompts = loaded
    config = ReductionConfig(keep=0.5, num_frames=8, repeats=1)
    rows = list(
        reduction_rows(
            model, lambda twin: Answerer(twin, answerer._tokenizer), [task_of(prompts)], config, max_new_tokens=16
        )
    )
    none, *others = rows
    assert (none["plan"], none["kept_on_average"], none["prefill_time_over_none"]) == ("none", 1.0, 1.0)
    assert none["choice_score"] == 1.0
    for row in others:
        assert row["kept_at_the_end"] == 0.5 <= row["kept_on_average"] < 1.0
        assert row["choice_change"] == row["choice_score"] - 1.0
        assert len(row["prefill_seconds"]) == 1
        assert row["prefill_time_over_none"] == row["prefill_seconds"][0] / none["prefill_seconds"][0]


def test_waiting_for_other_processes_is_no_prefill_time(
    loaded: tuple[Any, Answerer, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: Any) -> Tensor:
        time.sleep(0.1)
        return torch.zeros(1)

    monkeypatch.setattr(reduction, "prefill", slow)
    config = ReductionConfig(keep=0.5, num_frames=1, repeats=1)
    model, answerer, _ = loaded
    none = next(reduction_rows(model, lambda twin: Answerer(twin, answerer._tokenizer), [], config, max_new_tokens=1))
    assert none["prefill_seconds"][0] < 0.09


def test_a_needle_lies_at_its_depth_among_repeated_haystack() -> None:
    hay, needle = torch.arange(3.0).view(3, 1, 1), torch.full((2, 1, 1), 9.0)
    places = {depth: place_needle(needle, hay, 7, depth).flatten().tolist() for depth in (0.0, 0.5, 1.0)}
    assert places == {
        0.0: [9, 9, 0, 1, 2, 0, 1],
        0.5: [0, 1, 9, 9, 2, 0, 1],
        1.0: [0, 1, 2, 0, 1, 9, 9],
    }


def test_needles_are_the_frames_of_an_interval_and_the_haystack_is_far_from_any(known: KnownAnswers) -> None:
    store = FeatureStore.open(known.feature_store)
    config = NeedleConfig(num_frames=(6,), num_depths=2, num_questions=1)
    intervals = [grounding_row(number, start_seconds=0.0, end_seconds=1.0) for number in range(4)]
    needles, haystack = find_needles(store, [choice_row(number) for number in range(4)], intervals, config)
    assert [needle.question["sample_id"] for needle in needles] == ["choice-0", "choice-1"]
    assert [tuple(needle.frames_FND.shape) for needle in needles] == [(1, 1, 8)] * 2
    assert tuple(haystack.shape) == (3 * 2, 1, 8)  # frames 2 and 3 of three videos, as many as are needed
    with pytest.raises(ValueError, match=r"set needle\.task and needle\.intervals"):
        find_needles(store, [choice_row(0)], [], config)


class ScriptedAnswerer:
    """Generates "once", and finds the second option the most probable."""

    def __init__(self, frames: list[int], asked: list[str]) -> None:
        self.frames, self.asked = frames, asked

    def answer(self, prompts: list[Prompt], options: list[Any], *, max_new_tokens: int) -> list[Answer]:
        self.frames.append(len(prompts[0].media[0]))
        self.asked.append(prompts[0].text)
        scores = tuple(-float(abs(number - 1)) for number in range(len(options[0])))
        return [Answer(text="once", option_log_probs=scores, num_prompt_tokens=1, num_cached_tokens=0)]


def test_a_needle_is_found_by_the_most_probable_option_whatever_is_generated() -> None:
    model, frames, asked = make_model(SMALL), list[int](), list[str]()
    rows = [choice_row(number, question=f"{number}") for number in range(2)]
    needles = [Needle(question=row | {"answer": row["choices"][1]}, frames_FND=torch.ones(1, 2, 8)) for row in rows]
    config = NeedleConfig(num_frames=(3, 5), num_depths=2, num_questions=1)
    answerer: Any = ScriptedAnswerer(frames, asked)
    found = list(needle_rows(model, lambda _: answerer, needles, torch.zeros(4, 2, 8), config, max_new_tokens=4))
    assert [(row["num_frames"], row["model"], row["depth"]) for row in found] == [
        (length, name, depth) for length in (3, 5) for name in ("with TransV", "without TransV") for depth in (0, 1)
    ]
    assert all((row["accuracy"], row["generated"]) == (1.0, 0.0) for row in found)
    assert frames == [3 * 2] * 4 + [5 * 2] * 4
    assert asked == ["0", "1"] * 4  # each depth has its own question


def test_speed_counts_the_tokens_of_all_answers(loaded: tuple[Any, Answerer, list[Any]]) -> None:
    config = SpeedConfig(num_frames=(2,), batch_sizes=(2,), num_new_tokens=3, repeats=2)
    rows = list(speed_rows(loaded[0], config, backend="auto"))
    assert [row["model"] for row in rows] == ["hybrid", "Transformer of its size"]
    for row in rows:
        assert row["num_prompt_tokens"] == 2 + 32
        assert row["tokens_per_second"] == pytest.approx(2 * 3 / statistics.median(row["seconds"]))
    with pytest.raises(ValueError, match="compares a hybrid"):
        next(speed_rows(make_model(SMALL_QWEN), config, backend="auto"))


def test_maps_of_several_questions_are_their_average(loaded: tuple[Any, Answerer, list[Any]]) -> None:
    model, answerer, prompts = loaded
    pairs = [(prompt, row["answer"]) for row, prompt in prompts[:2]]
    batches = [batch for pair in pairs for batch in answerer.pack_answers([pair])]
    mamba, attention = layer_maps(model, batches, MapsConfig(num_bins=4))
    assert (mamba.block_type, attention.block_type) == ("mamba", "attention")
    for layer_map in (mamba, attention):
        shares = {(row["from"], row["to"]): row["share"] for row in layer_map.rows()}
        for query in ("system", "vision", "instruction", "response"):
            total = sum(share for (start, _), share in shares.items() if start == query)
            assert total == pytest.approx(1.0, abs=1e-5)
        assert layer_map.kind_ends[-1] == 1.0
        assert list(layer_map.kind_ends) == sorted(layer_map.kind_ends)
        assert layer_map.picture_BB.sum(1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    singles = [
        observe(model, batch, [1], lambda tokens, stream: pool_map(tokens, stream.token_kind_T, 4))[1]
        for batch in batches
    ]
    expected = sum(float(one.sum_HAB[:, 2, 1].mean()) for one in singles) / sum(
        int(o.num_queries_A[2]) for o in singles
    )
    assert shares["instruction", "vision"] == pytest.approx(expected, rel=1e-5)


def test_queries_are_spread_and_end_with_the_last_token() -> None:
    assert spread(9, 3, torch.device("cpu")).tolist() == [2, 5, 8]
    assert spread(3, 9, torch.device("cpu")).tolist() == [0, 1, 2]


@pytest.mark.slow
def test_the_job_writes_numbers_and_pictures_that_parse(known: KnownAnswers, tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "jobs" / "analyze.py"))["main"]
    config = ROOT / "ray_configs" / "tiny" / "analyze.yaml"
    keys = {
        "weights": known.weights,
        "feature_store": known.feature_store,
        "questions": known.questions,
        "output": tmp_path,
    }
    code = main(
        ["--config", str(config), *(f"{key}={value}" for key, value in keys.items()), "tasks=[choice, grounding]",
         f"transformer={known.weights}", "answering.num_threads=1", "maps.num_bins=6", "maps.num_questions=2",
         "maps.heads=[[0, 1], [1, 3]]", "blocking.flows=[v2i]", "dropping.keep_ratios=[0.5]",
         "figures=[blocking, dropping, maps, curves, examples, speed, needle, frames, reduction]",
         "needle.num_frames=[4, 8]", "needle.num_depths=2", "needle.num_questions=2", "memory_gb=[30]",
         "memory_presets=[9b]",
         "reduction.keep=0.5", "reduction.num_frames=4", "reduction.repeats=1", "speed.num_frames=[2]",
         "speed.batch_sizes=[1]", "speed.num_new_tokens=2", "speed.repeats=1"]
    )  # fmt: skip
    assert code == 0
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    drawn = ["blocking", "dropping", "groups", "curves", "curves-overlap", "examples", "speed"]
    drawn += ["map-00", "map-01", "map-00-head-001", "map-01-head-003"]
    drawn += ["needle-without-transv"]
    rows_of = ("blocking", "dropping", "speed", "needle", "frames", "reduction")
    tables = {f"{name}.{kind}" for name in rows_of for kind in ("csv", "json")}
    tables |= {"maps.json", "groups.csv", "curves.json", "examples.json"}
    assert names == tables | {f"{name}.{kind}" for name in drawn for kind in ("svg", "png")}
    for path in tmp_path.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    for text in (">system<", ">vision<", "token read, position", "absolute weights", "head 3"):
        assert text in (tmp_path / "map-01-head-003.svg").read_text()
    groups = (tmp_path / "groups.svg").read_text()
    assert groups.count(">reads vision<") == groups.count(">hybrid<") == groups.count(">Transformer<") == 1
    rows = json.loads((tmp_path / "blocking.json").read_text())
    with (tmp_path / "blocking.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows) == 2 * (1 + 2 * 2)
    assert {row["metric"] for row in rows} == {"accuracy", "mIoU"}
    needle = json.loads((tmp_path / "needle.json").read_text())
    assert [(row["num_frames"], row["depth"]) for row in needle] == [(4, 0.0), (4, 1.0), (8, 0.0), (8, 1.0)]
    assert all(row["chance"] == 0.25 <= 1.0 and row["num_questions"] == 2 for row in needle)
    maps = json.loads((tmp_path / "maps.json").read_text())
    assert [(entry["layer"], list(entry["picture_by_head"])) for entry in maps] == [(0, ["1"]), (1, ["3"])]
    frames = json.loads((tmp_path / "frames.json").read_text())
    assert [(row["model"], row["dtype"], row["plan"]) for row in frames] == [
        ("weights", "float32", "as trained"), ("weights", "float32", "without TransV"),
        ("9b", "bfloat16", "as trained"), ("9b", "bfloat16", "without TransV"),
    ]  # fmt: skip
    assert all(row["num_frames_last_logits"] > 20 * row["num_frames_all_logits"] > 0 for row in frames[2:])
    example = json.loads((tmp_path / "examples.json").read_text())[0]
    assert (example["generated"], example["score"]) == ("red (A)", 1.0)
    assert example["note"].startswith("no frames of ")  # the store's videos do not exist


def test_weights_may_be_remote(known: KnownAnswers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG_VARIABLE, str(tmp_path / "log"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = replace(config_of(known, tmp_path / "out", figures=("maps",)), weights=f"counted://{known.weights}")
    written = analyze(config)
    assert json.loads(Path(written[0]).read_text())[0]["layer"] == 0


def test_questions_without_media_are_skipped_and_none_left_is_an_error(known: KnownAnswers, tmp_path: Path) -> None:
    gone = [{"media_id": "gone", "start_seconds": None, "end_seconds": None}]
    write_questions(tmp_path / "choice.parquet", [grounding_row(0, media=gone)])
    with pytest.raises(ValueError, match="none of 1 questions has its media"):
        run_analysis(config_of(known, tmp_path / "out", questions=str(tmp_path)))
    with pytest.raises(ValueError, match="at least one"):
        config_of(known, tmp_path, figures=())
    with pytest.raises(ValueError, match=r"there are no presets \['9B'\]; there are \['9b'"):
        config_of(known, tmp_path, memory_presets=("9B",))
    with pytest.raises(ValueError, match=r"head 9 of block 1, which has 4 mapped heads; mapped blocks are \[0, 1\]"):
        run_analysis(config_of(known, tmp_path / "out", figures=("maps",), maps=MapsConfig(heads=((1, 9),))))
