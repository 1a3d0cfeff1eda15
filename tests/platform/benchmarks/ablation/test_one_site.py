"""The study of one site without its long steps, and with them in small."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from reference.toy_demo import make_toy_demo
from timeviper_model.batching.batch import PackedBatch
from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.benchmarks.ablation.one_site import (
    BASE_SEED,
    ROWS,
    UNTRAINED,
    OneSite,
    do_row,
    format_table,
    mean_interval,
    prepare,
)
from timeviper_platform.common.config import parse_config
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.phase import first_model, prepare_phase

ROOT = Path(__file__).resolve().parents[4]
main = runpy.run_path(str(ROOT / "jobs" / "ablation.py"))["main"]
TRAINED = [row for row in ROWS if row not in UNTRAINED]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> OneSite:
    folder = tmp_path_factory.mktemp("one-site")
    found = OneSite(folder=folder / "study", demo=make_toy_demo(folder / "demo"), quick=True)
    prepare(found)
    return found


def _first_batch(study: OneSite, row: str) -> tuple[Any, PackedBatch]:
    values = study.training(row, 0)
    values["phases"]["instruct"]["init"]["weights"] = str(study.folder / "start")
    config = parse_config(TrainConfig, values)
    init = config.phases["instruct"].init
    assert init is not None
    store = FeatureStore.open(config.feature_store)
    model = first_model(init, store, None)
    tokenizer = load_tokenizer(config.tokenizer)
    phase = prepare_phase(config, "instruct", model, store, tokenizer, rank=0, world_size=1)
    batch = next(phase.loader.steps(PackPosition(0, 0), 0, 1)).micro_batches[0].batch
    return phase, batch.to(torch.device("cpu"), torch.float32)


def test_rows_with_a_site_keep_the_first_and_last_of_30_tokens_and_start_with_closed_gates(study: OneSite) -> None:
    losses = {}
    for row in ("none", *TRAINED):
        phase, batch = _first_batch(study, row)
        with torch.no_grad():
            output = phase.model(batch, use_transv=True)
        num_videos = batch.num_segments
        kept = [] if row == "none" else [2 * num_videos]
        assert output.num_vision_tokens.tolist() == [30 * num_videos, *kept]
        losses[row] = output.loss_sum.item()
    assert losses["td"] == losses["transv"] == losses["kept"] != losses["none"]


def test_the_model_trains_at_a_low_rate_and_only_rows_with_transfer_have_more_weights(study: OneSite) -> None:
    rates = {}
    for row in TRAINED:
        phase, _ = _first_batch(study, row)
        rates[row] = {group.name.split()[0]: group.lr for group in phase.groups}
    model, projections, gate = r"(backbone|lm_head|projector)\..*", r"transv\..*_proj\..*", r"transv\..*\.alpha"
    assert rates["td"] == {model: 1e-4}
    assert rates["transv"] == rates["kept"] == {model: 1e-4, projections: 3e-3, gate: 3e-2}


def test_the_control_differs_from_transv_by_its_sources_alone(study: OneSite) -> None:
    (transv,), (kept,) = study.sites("transv"), study.sites("kept")
    assert (transv.transfer_from, kept.transfer_from) == ("dropped", "kept")
    assert [transv.layer, transv.keep, transv.select] == [kept.layer, kept.keep, kept.select] == [5, 0.05, "uniform"]


def test_transfer_reads_the_tokens_that_the_row_names(study: OneSite) -> None:
    """With open gates, a change of one frame reaches the answers of `transv` alone if the frame is dropped."""
    for row, dropped, changes in (("transv", True, True), ("kept", True, False), ("td", True, False)):
        phase, batch = _first_batch(study, row)
        model = phase.model.eval()
        with torch.no_grad():
            for block in model.backbone.layers[:5]:  # nothing else may carry the frame past the site
                for parameter in block.mixer.parameters():
                    parameter.zero_()
            for name, parameter in model.named_parameters():
                if name.endswith(".alpha"):
                    parameter.fill_(1.0)
            before = model(batch, use_transv=True).loss_sum
            batch.vision_features[7 if dropped else 0] += 1.0
            after = model(batch, use_transv=True).loss_sum
        assert bool(before != after) is changes


def _finish(study: OneSite, row: str, seed: int, scores: list[float]) -> None:
    folder = study.run_folder(row, seed)
    folder.mkdir(parents=True)
    rows = [
        {"task": task, "video": f"v{n}", "score": s} for task in ("choice", "grounding") for n, s in enumerate(scores)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "scores.outcomes.parquet")
    mean = sum(scores) / len(scores)
    outcome = {
        **study.recipe(row, seed),
        "gates": [0.25] if row == "transv" else [],
        "scores": {"choice": {"accuracy": mean}, "grounding": {"miou": mean}},
    }
    (folder / "outcome.json").write_text(json.dumps(outcome))


def test_the_table_has_means_over_seeds_and_differences_from_dropping(tmp_path: Path) -> None:
    study = OneSite(folder=tmp_path, demo=tmp_path)
    for seed, (td, transv) in enumerate([(0.2, 0.5), (0.3, 0.5), (0.4, 0.8)]):
        _finish(study, "td", seed, [td, td])
        _finish(study, "transv", seed, [transv, transv])
    head, _, td_line, transv_line = format_table(study, list(ROWS), [0, 1, 2]).splitlines()
    assert head.startswith("| row | site (layer: kept) | which | grounding mIoU | mIoU less td's | tanh(alpha) |")
    assert td_line.startswith("| token dropping | uniform 5: 0.05 | 0.300 (")
    assert td_line.endswith("; 0.200, 0.300, 0.400 | - | - |")
    # differences 0.3, 0.2, 0.4: mean 0.3, standard deviation 0.1, 4.303 * 0.1 / sqrt(3) = 0.248
    assert transv_line.endswith("; 0.500, 0.500, 0.800 | +0.300 (+0.052 - +0.548) | 0.25, 0.25, 0.25 |")
    assert mean_interval([0.1]) is None


def test_a_finished_row_is_not_run_again_and_another_recipe_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = OneSite(folder=tmp_path, demo=tmp_path)
    _finish(study, "td", 0, [0.5, 0.5])
    arguments = ["--study", "one-site", "--folder", str(tmp_path), "--demo", str(tmp_path), "--rows", "td"]
    assert main([*arguments, "--seeds", "0"]) == 0  # starts nothing
    assert capsys.readouterr().out == (tmp_path / "site-5.md").read_text()
    outcome = json.loads((study.run_folder("td", 0) / "outcome.json").read_text())
    for part in ("training", "base"):
        changed = copy.deepcopy(outcome)
        changed[part]["phases"]["instruct"]["steps"] += 1
        (study.run_folder("td", 0) / "outcome.json").write_text(json.dumps(changed))
        assert main([*arguments, "--seeds", "0"]) == 1
        assert "outcome.json is of another recipe; remove" in capsys.readouterr().err


def test_a_run_of_another_recipe_is_not_continued(study: OneSite) -> None:
    folder = study.run_folder("base", BASE_SEED)
    folder.mkdir(parents=True)
    recipe = study.training("base", BASE_SEED)
    recipe["phases"]["instruct"]["steps"] += 1
    (folder / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=r"base-seed-0 is of another recipe; remove it"):
        do_row(study, "none", 0)


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--study", "one-site", "--folder", str(tmp_path / "study"), "--demo", str(tmp_path)]
    for more, message in (
        (["--rows", "pdrop"], "there are no rows pdrop at one site; there are none, dropped, td, transv, kept"),
        (["--seeds", "a"], "--seeds a must be comma-separated whole numbers"),
        (["--site", "10"], "--site 10 must be one of the 10 blocks, 0 to 9"),
    ):
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(arguments) == 1
    assert "is not the folder of a demo: it has no corpus/truth.parquet" in capsys.readouterr().err


@pytest.mark.slow
def test_the_job_trains_and_scores_rows_of_two_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = make_toy_demo(tmp_path / "demo")
    arguments = ["--study", "one-site", "--quick", "--folder", str(tmp_path / "study"), "--demo", str(demo)]
    assert main([*arguments, "--rows", "dropped,td,transv", "--seeds", "0,1"]) == 0
    assert len(list((tmp_path / "study" / "runs").glob("*/weights"))) == 6  # base, dropped, and two seeds of two
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {ROWS[row]}" for row in ("dropped", "td", "transv")]
    transv = json.loads((tmp_path / "study/runs/transv-site-5-seed-1/outcome.json").read_text())
    assert transv["report"]["steps"] == 2
    assert len(transv["gates"]) == 1
    assert transv["gates"][0] != 0.0
    assert transv["scores"]["grounding"]["num_questions"] == 32
