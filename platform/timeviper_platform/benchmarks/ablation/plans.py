"""TransV plans on the demo's corpus: one model per row, trained and evaluated alike, as one table.

All rows share the corpus, features and the phases `language` and `align`. Each row trains the demo's `instruct` phase
with its own TransV sites and answers every held-out question. Finished rows are kept: an interrupted run continues.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from timeviper_model.batching.prompt import Turn, build_sample
from timeviper_model.batching.tokenizer_template import chat_template
from timeviper_model.config import TINY, TransVSite, parse_transv_plan
from timeviper_model.inference.chunked_transv import plan_sites
from timeviper_model.weights.weights_folder import load_config, load_tokenizer
from timeviper_platform.common.job import USAGE_EXIT_CODE, JobError, JobResult, config_folder, job_command
from timeviper_platform.common.ray_cluster import local_cluster
from timeviper_platform.data.store.reader import FeatureStore

logger = logging.getLogger(__name__)

DEMO_FOLDER = "outputs/demo"
"""Folder named in ray_configs/tiny."""
NUM_LOGICAL_CPUS = 4
SHARED_RUN = "ablation-shared"
STEPS = {"language": 400, "align": 100, "instruct": 600}
"""Enough that rows differ by their sites, not by unfinished training."""
QUICK_STEPS = {"language": 20, "align": 10, "instruct": 30}
CORPUS = ("fps=4",)
"""Differences from the demo's corpus."""
DEFAULT_FOLDER = "outputs/ablation"
TASKS = {"choice": "which", "order": "order", "count": "count", "grounding": "grounding mIoU"}
"""Held-out files and their column titles."""


DEMO_PLAN = "uni_3_0.5-attn_8_0.75"
"""Plan of the preset `tiny` in the notation of the paper, whose last numbers are shares dropped."""
ROWS = {
    "none": "no site",
    "attention": "TransV, the plan itself",
    "uniform": "TransV, uniform at all sites",
    "td": "token dropping: the plan without transfer",
    "pdrop": "PyramidDrop: by attention at all sites, no transfer",
}


def sites_of(row: str, plan: str) -> tuple[TransVSite, ...]:
    """TransV sites of a row. All rows but `none` keep the shares of the plan; `pdrop` uses attention blocks."""
    sites = parse_transv_plan(plan)
    layers = [layer for layer, kind in enumerate(TINY.text.block_types) if kind == "attention"]
    match row:
        case "none":
            return ()
        case "uniform":
            return tuple(replace(site, select="uniform") for site in sites)
        case "td":
            return tuple(replace(site, transfer="none") for site in sites)
        case "pdrop":
            return tuple(
                TransVSite(
                    layer=min(layer for layer in layers if layer >= site.layer),
                    select="attention",
                    keep=site.keep,
                    transfer="none",
                )
                for site in sites
            )
        case _:
            return sites


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    folder: Path
    quick: bool = False
    plan: str = DEMO_PLAN

    def path(self, *parts: str) -> str:
        return str(self.folder.joinpath(*parts))

    def run_name(self, row: str) -> str:
        """Name of the run; `none` is the same under every plan."""
        return f"ablation-{row}" + ("" if row == "none" or self.plan == DEMO_PLAN else f"-{self.plan}")

    def row_file(self, row: str) -> Path:
        return self.folder / "runs" / self.run_name(row) / "outcome.json"

    def values(self, name: str) -> dict[str, Any]:
        """One of the demo's configurations as YAML values, naming this folder."""
        text = (config_folder() / "tiny" / f"{name}.yaml").read_text().replace(DEMO_FOLDER, str(self.folder))
        values: dict[str, Any] = yaml.safe_load(text)
        if name == "train":
            for phase, steps in (QUICK_STEPS if self.quick else STEPS).items():
                values["phases"][phase]["steps"] = steps
        return values

    def shared_training(self) -> dict[str, Any]:
        """The demo's training without its last phase."""
        values = self.values("train")
        del values["phases"]["instruct"]
        return values | {"name": SHARED_RUN}

    def row_training(self, row: str) -> dict[str, Any]:
        """The demo's last phase with the sites of the row, from the shared weights."""
        values = self.values("train")
        init = {
            "weights": self.path("runs", SHARED_RUN, "weights", "align"),
            "transv": [asdict(site) for site in sites_of(row, self.plan)],
        }
        instruct = copy.deepcopy(values["phases"]["instruct"]) | {"init": init}
        return values | {"name": self.run_name(row), "phases": {"instruct": instruct}}

    def row_evaluation(self, row: str) -> dict[str, Any]:
        weights = self.path("runs", self.run_name(row), "weights", "instruct")
        return self.values("evaluate") | {
            "weights": weights,
            "output": str(self.row_file(row).with_name("scores.json")),
        }


def run_plans(options: argparse.Namespace) -> JobResult:
    ablation, rows = _plan(options)
    missing = [row for row in rows if read_row(ablation, row) is None]
    if missing:
        _announce("corpus and features, as the demo's")
        quick = ["--quick"] if ablation.quick else []
        _job(
            "demo",
            dict(os.environ),
            "--until",
            "preprocess",
            "--folder",
            str(ablation.folder),
            *(f"--corpus={setting}" for setting in CORPUS),
            *quick,
        )
        with local_cluster(num_cpus=NUM_LOGICAL_CPUS) as cluster:
            environment = {**os.environ, **cluster}
            _announce("shared phases: " + ", ".join(ablation.shared_training()["phases"]))
            _run("train", ablation, SHARED_RUN, ablation.shared_training(), environment)
            for row in missing:
                do_row(ablation, row, environment)
                logger.info("%s", format_table({row: done_rows(ablation)[row]}, ablation.plan))
    table = format_table(done_rows(ablation), ablation.plan)
    Path(ablation.path("ablation.md")).write_text(table + "\n")
    return JobResult([table])


def _plan(options: argparse.Namespace) -> tuple[Ablation, list[str]]:
    rows = (options.rows or ",".join(ROWS)).split(",")
    if unknown := sorted(set(rows) - set(ROWS)):
        message = f"there are no rows {', '.join(unknown)}; there are {', '.join(ROWS)}"
        raise JobError(message, exit_code=USAGE_EXIT_CODE)
    try:
        replace(TINY, transv=sites_of("attention", options.plan))
    except ValueError as error:
        raise JobError(f"--plan: {error}", exit_code=USAGE_EXIT_CODE) from error
    folder = options.folder or Path(DEFAULT_FOLDER + ("-quick" if options.quick else ""))
    return Ablation(folder=folder.resolve(), quick=options.quick, plan=options.plan), rows


def do_row(ablation: Ablation, row: str, environment: Mapping[str, str]) -> None:
    training, evaluation = ablation.row_training(row), ablation.row_evaluation(row)
    _announce(f"row {row}: {ROWS[row]}")
    _run("train", ablation, training["name"], training, environment)
    _run("evaluate", ablation, f"{training['name']}-evaluate", evaluation, environment)
    phase = _read_json(ablation.row_file(row).with_name("report.json"))["instruct"]
    outcome = {
        "training": training,
        "steps": phase["steps"],
        "loss_last": phase["loss_last"],
        "seconds": phase["seconds"],
        "tokens": prompt_tokens(evaluation, "grounding"),
        "scores": _read_json(Path(evaluation["output"])),
    }
    file = ablation.row_file(row)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(outcome, indent=2) + "\n")
    part.rename(file)


def read_row(ablation: Ablation, row: str) -> dict[str, Any] | None:
    """Outcome of a row, or None if it is not finished.

    Raises:
        ValueError: if it was trained with another recipe or other sites.
    """
    file = ablation.row_file(row)
    if not file.is_file():
        return None
    outcome: dict[str, Any] = _read_json(file)
    if outcome["training"] != ablation.row_training(row):
        raise ValueError(f"{file} is of another recipe; remove {file.parent}, or take another --folder")
    return outcome


def prompt_tokens(evaluation: Mapping[str, Any], task: str) -> dict[str, float]:
    """Mean prompt length of a task with its videos: vision tokens and all tokens, at the first and last block."""
    config, tokenizer = load_config(evaluation["weights"]), load_tokenizer(evaluation["weights"])
    store = FeatureStore.open(evaluation["feature_store"])
    sums = [0, 0, 0, 0]
    questions = pq.read_table(Path(evaluation["questions"]) / f"{task}.parquet").to_pylist()
    for question in questions:
        infos = [store.info(medium["media_id"]) for medium in question["media"]]
        frames = [min(info.num_frames, evaluation["answering"]["max_frames"]) for info in infos]
        media = [number * info.num_tokens_per_frame for number, info in zip(frames, infos, strict=True)]
        turns = [Turn(role="user", text=question["question"])]
        template = chat_template(config.chat_template, tokenizer)
        prompt = build_sample(tokenizer, turns, media, template=template, add_generation_prompt=True)
        sites = plan_sites(config, sum(media))
        num_left = list(sites.values())[-1].num_kept if sites else sum(media)
        counts = sum(media), num_left, len(prompt), len(prompt) - sum(media) + num_left
        sums = [total + count for total, count in zip(sums, counts, strict=True)]
    names = ("vision_first", "vision_last", "first", "last")
    return {name: round(total / len(questions), 1) for name, total in zip(names, sums, strict=True)}


def done_rows(ablation: Ablation) -> dict[str, dict[str, Any]]:
    return {row: outcome for row in ROWS if (outcome := read_row(ablation, row)) is not None}


def format_table(rows: Mapping[str, Mapping[str, Any]], plan: str = DEMO_PLAN) -> str:
    """Markdown table of rows: sites, scores with 95 % intervals, tokens at the last block, command."""
    heads = ["row", "sites (layer: kept)", *TASKS.values(), "prompt tokens, first -> last block", "command"]
    lines = [table_line(heads), table_line(["---"] * len(heads))]
    for row, outcome in rows.items():
        scores = [_score(outcome["scores"][task]) for task in TASKS]
        tokens = f"{outcome['tokens']['first']:.0f} -> {outcome['tokens']['last']:.0f}"
        command = f"python jobs/ablation.py --rows {row}" + ("" if plan == DEMO_PLAN else f" --plan {plan}")
        lines.append(table_line([ROWS[row], describe_sites(sites_of(row, plan)), *scores, tokens, f"`{command}`"]))
    return "\n".join(lines)


def describe_sites(sites: Sequence[TransVSite]) -> str:
    return ", ".join(f"{site.select} {site.layer}: {site.keep:g}" for site in sites) or "-"


def _score(scores: Mapping[str, Any]) -> str:
    value = scores["accuracy"] if "accuracy" in scores else scores["miou"]
    low, high = scores["interval_95"]
    return f"{value:.3f} ({low:.2f} - {high:.2f})"


def table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _run(job: str, ablation: Ablation, name: str, values: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    file = ablation.folder / "configs" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    _job(job, environment, "--config", str(file))


def _job(name: str, environment: Mapping[str, str], *arguments: str) -> None:
    subprocess.run(job_command(name, *arguments), env=environment, check=True)


def _announce(step: str) -> None:
    logger.info("=== %s", step)


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text())
