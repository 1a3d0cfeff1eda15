from __future__ import annotations

import csv
import json
import runpy
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.counted_files import LOG_VARIABLE
from reference.known_answers import KnownAnswers, choice_row, grounding_row, write_questions
from timeviper_model.analysis.blocking import Blocking, cut_flow
from timeviper_model.analysis.maps import observe
from timeviper_model.analysis.pooling import pool_map
from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.evaluation.analyze import AnalyzeConfig, analyze, make_answered, run_analysis
from timeviper_platform.evaluation.answering import Answerer, Prompt
from timeviper_platform.evaluation.evaluator import AnsweringConfig, load_model, read_media
from timeviper_platform.evaluation.figures import (
    BlockingSweep,
    DroppingSweep,
    MapsConfig,
    blocking_rows,
    dropping_rows,
    layer_maps,
    spread,
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
    return replace(AnalyzeConfig(**values, maps=maps), **changes)


def test_scores_equal_those_of_the_evaluation(known: KnownAnswers, loaded: tuple[Any, Answerer, list[Any]]) -> None:
    model, answerer, prompts = loaded
    start = next(blocking_rows(model, make_answered(answerer, prompts), BlockingSweep()))
    assert start["accuracy"] == 1.0
    options = [row["choices"] for row, _ in prompts]
    scores = answerer.score_options([prompt for _, prompt in prompts], options)
    tokenizer = load_tokenizer(known.weights)
    expected = []
    for (row, _), texts, of in zip(prompts, options, scores, strict=True):
        length = len(tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) + 2  # a new line, the end
        expected.append(of[texts.index(row["answer"])] / length)
    assert start["log_prob"] == pytest.approx(sum(expected) / 4, rel=1e-4)


def test_blocking_the_video_everywhere_leaves_a_guess(loaded: tuple[Any, Answerer, list[Any]]) -> None:
    model, answerer, prompts = loaded
    sweep = BlockingSweep(flows=("v2i", "v2r"), scopes=("from_layer",))
    start, *rows = blocking_rows(model, make_answered(answerer, prompts), sweep)
    assert [(row["flow"], row["layer"]) for row in rows] == [("v2i", 0), ("v2i", 1), ("v2r", 0), ("v2r", 1)]
    assert all(row["log_prob"] < start["log_prob"] for row in rows if row["layer"] == 0)
    answered = make_answered(answerer, prompts)
    run_block = cut_flow(model, Blocking(flow="v2i", scope="from_layer", layer=1))
    by_hand = answered.score(partial(model.target_log_probs, run_block=run_block))
    assert {key: rows[1][key] for key in by_hand} == by_hand


def test_dropping_all_at_the_entrance_is_a_guess_and_none_is_the_model(loaded: tuple[Any, Answerer, list[Any]]) -> None:
    model, answerer, prompts = loaded
    start, *rows = dropping_rows(model, make_answered(answerer, prompts), DroppingSweep(keep_ratios=(1.0, 0.0)))
    keys = [(row["select"], row["keep"], row["layer"]) for row in rows]
    assert keys == [
        ("uniform", 1.0, 0), ("uniform", 1.0, 1), ("uniform", 0.0, 0), ("uniform", 0.0, 1),
        ("attention", 1.0, 1), ("attention", 0.0, 1),
    ]  # fmt: skip
    assert rows[0]["log_prob"] == start["log_prob"]
    assert rows[2]["accuracy"] == 0.25
    assert start["accuracy"] == 1.0


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
         "answering.num_threads=1", "maps.num_bins=6"]
    )  # fmt: skip
    assert code == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(
        [f"{figure}.{kind}" for figure in ("blocking", "dropping") for kind in ("csv", "json", "svg")]
        + ["maps.json", "groups.csv", "groups.svg", "map-00.svg", "map-01.svg"]
    )
    for path in tmp_path.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    for text in (">system<", ">vision<", "token read, position", "absolute weights"):
        assert text in (tmp_path / "map-01.svg").read_text()
    assert (tmp_path / "groups.svg").read_text().count(">reads vision<") == 1
    rows = json.loads((tmp_path / "blocking.json").read_text())
    with (tmp_path / "blocking.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows) == 1 + 2 * 2 * 2
    assert [entry["layer"] for entry in json.loads((tmp_path / "maps.json").read_text())] == [0, 1]


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
