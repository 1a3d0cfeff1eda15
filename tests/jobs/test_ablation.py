"""The ablation without its long steps: plans, first losses, table and finished rows."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from reference.training_corpus import NUM_TOKENS_PER_FRAME, Corpus, make_corpus
from timeviper_model.config import TINY, pyramid_drop
from timeviper_model.inference.chunked_transv import plan_sites
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import load_tokenizer, save_pretrained
from timeviper_platform.benchmarks.ablation.plans import (
    DEMO_PLAN,
    ROWS,
    SHARED_RUN,
    Ablation,
    describe_sites,
    format_table,
    prompt_tokens,
    sites_of,
)
from timeviper_platform.common.config import parse_config
from timeviper_platform.common.schemas import QUESTIONS
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.phase import first_model, prepare_phase

ROOT = Path(__file__).resolve().parents[2]
main = runpy.run_path(str(ROOT / "jobs" / "ablation.py"))["main"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A toy corpus in the layout of the demo, with random weights in the folder of the shared run."""
    folder = tmp_path_factory.mktemp("ablation")
    toy = make_corpus(folder)
    model = TimeViper(TINY)
    model.init_weights(torch.Generator().manual_seed(0))
    weights = folder / "runs" / SHARED_RUN / "weights" / "align"
    weights.parent.mkdir(parents=True)
    save_pretrained(model, weights, tokenizer=load_tokenizer(toy.tokenizer))
    return toy


@pytest.mark.parametrize(
    ("plan", "num_left"),
    [(DEMO_PLAN, {3: 48, 8: 24}), ("uni_1_0.5-attn_8_0.9", {1: 48, 8: 10})],
)
def test_all_rows_but_two_keep_as_many_tokens(plan: str, num_left: dict[int, int]) -> None:
    found = {}
    for row in ROWS:
        config = replace(TINY, transv=sites_of(row, plan))
        found[row] = {layer: site.num_kept for layer, site in plan_sites(config, 96).items()}
    assert found.pop("none") == {}
    assert found.pop("pdrop") == {3: 48, 8: num_left[8]}
    assert list(found.values()) == [num_left] * 3
    without_transfer = [row for row in ROWS if {site.transfer for site in sites_of(row, plan)} == {"none"}]
    assert without_transfer == ["td", "pdrop"]


def test_the_default_plan_is_that_of_the_tiny_preset() -> None:
    assert sites_of("attention", DEMO_PLAN) == TINY.transv
    assert sites_of("pdrop", DEMO_PLAN) == pyramid_drop(TINY.text)


def test_another_plan_has_its_own_runs_except_for_none(tmp_path: Path) -> None:
    demo, other = (Ablation(folder=tmp_path, plan=plan) for plan in (DEMO_PLAN, "uni_1_0.5"))
    assert [demo.run_name(row) == other.run_name(row) for row in ROWS] == [row == "none" for row in ROWS]
    assert demo.row_training("none") == other.row_training("none")


def test_each_row_starts_from_the_shared_weights_with_its_own_sites(corpus: Corpus) -> None:
    ablation = Ablation(folder=corpus.folder, quick=True)
    store, tokenizer = FeatureStore.open(corpus.features), load_tokenizer(corpus.tokenizer)
    first_losses = {}
    for row in ROWS:
        values = ablation.row_training(row)
        values["phases"]["instruct"] |= {"samples": [{"uri": corpus.samples}]}
        config = parse_config(TrainConfig, values)
        phase_config = config.phases["instruct"]
        assert phase_config.init is not None
        assert phase_config.steps == 30
        model = first_model(phase_config.init, store, None)
        phase = prepare_phase(config, "instruct", model, store, tokenizer, rank=0, world_size=1)
        batch = next(phase.loader.steps(PackPosition(0, 0), 0, 1)).micro_batches[0].batch
        with torch.no_grad():
            output = model(batch.to(torch.device("cpu"), torch.float32), use_transv=phase_config.use_transv)
        present, *left = output.num_vision_tokens.tolist()
        assert len(left) == len(sites_of(row, DEMO_PLAN))
        assert all(number < present for number in left)
        first_losses[row] = output.loss_sum.item()
    # gates start closed: transfer changes nothing before training
    assert first_losses["attention"] == first_losses["td"]
    assert len(set(first_losses.values())) == 4


def test_prompt_tokens_count_what_the_sites_keep(corpus: Corpus, tmp_path: Path) -> None:
    row = dict.fromkeys(QUESTIONS.names) | {"sample_id": "a", "question": "What is this?", "answer": "x", "choices": []}
    media = [{"media_id": "video-5", "start_seconds": None, "end_seconds": None}]
    pq.write_table(pa.Table.from_pylist([row | {"media": media}], schema=QUESTIONS), tmp_path / "grounding.parquet")
    weights = corpus.folder / "runs" / SHARED_RUN / "weights" / "align"
    evaluation = {
        "weights": str(weights),
        "feature_store": corpus.features,
        "questions": str(tmp_path),
        "answering": {"max_frames": 6},
    }
    tokens = prompt_tokens(evaluation, "grounding")
    num_text = tokens["first"] - tokens["vision_first"]
    assert num_text > 3
    assert tokens == {
        "vision_first": 6 * NUM_TOKENS_PER_FRAME,
        "vision_last": 6,
        "first": num_text + 24,
        "last": num_text + 6,
    }


SCORES = {
    "choice": {"accuracy": 0.9959, "interval_95": [0.98, 0.9996]},
    "order": {"accuracy": 0.35, "interval_95": [0.3, 0.42]},
    "count": {"accuracy": 0.95, "interval_95": [0.91, 0.98]},
    "grounding": {"miou": 0.9432, "interval_95": [0.93, 0.95]},
}


def test_the_table_has_one_line_with_its_command_per_row() -> None:
    tokens = {"first": 130.4, "last": 58.4}
    table = format_table({"td": {"scores": SCORES, "tokens": tokens}})
    head, rule, line = table.splitlines()
    assert head.startswith("| row | sites (layer: kept) | which | order | count | grounding mIoU | prompt tokens")
    assert rule.count("---") == head.count(" | ") + 1
    assert line == (
        "| token dropping: the plan without transfer | uniform 3: 0.5, attention 8: 0.25 | 0.996 (0.98 - 1.00) |"
        " 0.350 (0.30 - 0.42) | 0.950 (0.91 - 0.98) | 0.943 (0.93 - 0.95) | 130 -> 58 |"
        " `python jobs/ablation.py --rows td` |"
    )
    other = format_table({"td": {"scores": SCORES, "tokens": tokens}}, "uni_1_0.5")
    assert other.endswith("| `python jobs/ablation.py --rows td --plan uni_1_0.5` |")
    assert describe_sites(()) == "-"


def test_a_finished_row_is_not_run_again_and_another_recipe_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation = Ablation(folder=tmp_path, quick=False)
    outcome = {"training": ablation.row_training("none"), "scores": SCORES, "tokens": {"first": 99.0, "last": 99.0}}
    file = ablation.row_file("none")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(outcome))
    assert main(["--rows", "none", "--folder", str(tmp_path)]) == 0  # starts nothing
    shown = capsys.readouterr().out
    assert "| no site | - | 0.996" in shown
    assert (tmp_path / "ablation.md").read_text() == shown
    outcome["training"]["phases"]["instruct"]["steps"] += 1
    file.write_text(json.dumps(outcome))
    assert main(["--rows", "none", "--folder", str(tmp_path)]) == 1
    assert re.search(r"outcome.json is of another recipe; remove .*ablation-none", capsys.readouterr().err)


def test_unknown_rows_and_unusable_plans_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plan", "attn_7_0.5"]) == 2
    assert "attention blocks are at [3, 8]" in capsys.readouterr().err
    assert main(["--rows", "none,all"]) == 2
    assert "there are no rows all; there are none, attention, uniform, td, pdrop" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_the_job_runs_missing_rows_and_writes_the_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--folder", str(tmp_path), "--rows"]
    assert main([*arguments, "td"]) == 0
    assert main([*arguments, "td,none"]) == 0
    table = (tmp_path / "ablation.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| no site", "| token dropping: the plan without transfer"]
    assert capfd.readouterr().out.count("=== row td") == 1
