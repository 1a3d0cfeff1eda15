"""TransV at one site where transfer is needed: the paper's Table 2, rows 2 and 3, with a control, over several seeds.

A base without a site is trained on short clips. Each row continues from its weights with one site, a low rate for the
model and a high one for the transfer. Finished rows are kept, interrupted ones continue. Does not start Ray.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import signal
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from timeviper_model.analysis.dropping import with_plan
from timeviper_model.config import TINY, TransVSite
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import from_pretrained, load_tokenizer, save_pretrained
from timeviper_platform.benchmarks.ablation.plans import describe_sites, table_line
from timeviper_platform.benchmarks.ablation.short_clips import TASKS, ShortClips, ShortClipsConfig, make_short_clips
from timeviper_platform.common import storage
from timeviper_platform.common.config import parse_config
from timeviper_platform.common.job import USAGE_EXIT_CODE, JobError, JobResult
from timeviper_platform.evaluation.evaluator import Evaluator
from timeviper_platform.evaluation.outcomes import Outcome, Question
from timeviper_platform.evaluation.run import EvaluateConfig, run_evaluation
from timeviper_platform.evaluation.scoring.intervals import interval_by_video, mean_of
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.interrupts import StoppedError
from timeviper_platform.training.local import train_local

logger = logging.getLogger(__name__)

DEFAULT_FOLDER = "outputs/ablation-one-site"
DEFAULT_SITE = 5
KEEP = 0.05
"""The first and the last of 30 tokens stay."""
ROWS = {
    "none": "the base: no site",
    "dropped": "token dropping in the base, as it is",
    "td": "token dropping",
    "transv": "TransV: transfer from the dropped tokens",
    "kept": "control: transfer from the kept tokens",
}
UNTRAINED = ("none", "dropped")
"""Rows with the base's own weights."""
BASELINE = "td"
BASE_STEPS, ROW_STEPS = 250, 100
BASE_TOKENS, ROW_TOKENS = 1200, 600
"""Per step: 11 and 5 conversations."""
BASE_LR = 1e-3
ROW_LR, TRANSV_LR, GATE_LR = 1e-4, 3e-3, 3e-2
"""The model barely changes, so that differences come from its site."""
BASE_SEED = 0
"""Seed of the base; `--seeds` set the rows' data order."""
MAX_QUESTIONS = 64
"""Per task."""
BATCH_QUESTIONS = 40
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""95 % quantiles of Student's t (two-sided) by number of seeds."""
TITLES = {"choice": "which", "grounding": "grounding mIoU"}


@dataclass(frozen=True, kw_only=True, slots=True)
class OneSite:
    folder: Path
    demo: Path
    site: int = DEFAULT_SITE
    quick: bool = False

    @property
    def clips(self) -> ShortClipsConfig:
        return ShortClipsConfig(num_train=64, num_held_out=32) if self.quick else ShortClipsConfig()

    def run_name(self, row: str, seed: int) -> str:
        site = "" if row in ("base", "none") else f"-site-{self.site}"
        return f"{row}{site}" if row in UNTRAINED else f"{row}{site}-seed-{seed}"

    def run_folder(self, row: str, seed: int) -> Path:
        return self.folder / "runs" / self.run_name(row, seed)

    def weights(self, row: str, seed: int) -> str:
        return str(self.run_folder(row, seed) / "weights" / "instruct")

    def sites(self, row: str) -> tuple[TransVSite, ...]:
        if row in ("base", "none"):
            return ()
        has_transfer = row in ("transv", "kept")
        return (
            TransVSite(
                layer=self.site,
                select="uniform",
                keep=KEEP,
                transfer="cross_attention" if has_transfer else "none",
                transfer_from="kept" if row == "kept" else "dropped",
            ),
        )

    def training(self, row: str, seed: int) -> dict[str, Any]:
        """Configuration of a row or the `base`."""
        corpus, is_base, sites = ShortClips(folder=self.folder / "corpus"), row == "base", self.sites(row)
        rules = [{"match": r"(backbone|lm_head|projector)\..*", "lr": BASE_LR if is_base else ROW_LR}]
        if any(site.transfer == "cross_attention" for site in sites):
            rules += [
                {"match": r"transv\..*_proj\..*", "lr": TRANSV_LR},
                {"match": r"transv\..*\.alpha", "lr": GATE_LR},
            ]
        steps = BASE_STEPS if is_base else ROW_STEPS
        phase = {
            "init": {
                "weights": str(self.folder / "start") if is_base else self.weights("base", BASE_SEED),
                "transv": [asdict(site) for site in sites],
            },
            "samples": [{"uri": corpus.samples}],
            "trainable": rules,
            "packing": {"max_tokens": BASE_TOKENS if is_base else ROW_TOKENS},
            "packs_per_step": 1,
            "steps": 2 if self.quick else steps,
            "schedule": {"warmup_ratio": 0.05},
        }
        return {
            "name": self.run_name(row, seed),
            "runs": str(self.folder / "runs"),
            "feature_store": corpus.features,
            "tokenizer": str(self.demo / "corpus" / "tokenizer"),
            "seed": seed,
            "phases": {"instruct": phase},
            "zero": {"stage": 0, "betas": [0.9, 0.95]},
            "checkpoint": {"every_steps": 50, "keep": 1},
            "metrics": {"tensorboard": False, "log_every_steps": 25},
        }

    def recipe(self, row: str, seed: int) -> dict[str, Any]:
        """What determines the weights of a row."""
        return {
            "base": self.training("base", BASE_SEED),
            "training": None if row in UNTRAINED else self.training(row, seed),
        }

    def evaluation(self, row: str, seed: int) -> dict[str, Any]:
        corpus = ShortClips(folder=self.folder / "corpus")
        return {
            "weights": self.weights(row, seed),
            "feature_store": corpus.features,
            "questions": corpus.questions,
            "tasks": list(TASKS),
            "max_questions": MAX_QUESTIONS,
            "output": str(self.run_folder(row, seed) / "scores.json"),
            "answering": {"max_new_tokens": 24},
        }


def run_one_site(options: argparse.Namespace) -> JobResult:
    """Runs what is missing, seed by seed; writes and reports the table."""
    study, rows, seeds = _plan(options)
    try:
        for seed, row in itertools.product(seeds, rows):
            if read_row(study, row, seed) is None:
                do_row(study, row, seed)
    except StoppedError as error:
        raise JobError(f"{error}; run the same command to continue", exit_code=128 + signal.SIGTERM) from error
    table = format_table(study, rows, seeds)
    (study.folder / f"site-{study.site}.md").write_text(table + "\n", encoding="utf-8")
    return JobResult([table])


def _plan(options: argparse.Namespace) -> tuple[OneSite, list[str], list[int]]:
    rows = (options.rows or ",".join(ROWS)).split(",")
    if unknown := sorted(set(rows) - set(ROWS)):
        message = f"there are no rows {', '.join(unknown)} at one site; there are {', '.join(ROWS)}"
        raise JobError(message, exit_code=USAGE_EXIT_CODE)
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError as error:
        message = f"--seeds {options.seeds} must be comma-separated whole numbers"
        raise JobError(message, exit_code=USAGE_EXIT_CODE) from error
    num_blocks = TINY.text.num_hidden_layers
    if not 0 <= options.site < num_blocks:
        message = f"--site {options.site} must be one of the {num_blocks} blocks, 0 to {num_blocks - 1}"
        raise JobError(message, exit_code=USAGE_EXIT_CODE)
    folder = options.folder or Path(DEFAULT_FOLDER + ("-quick" if options.quick else ""))
    study = OneSite(folder=folder.resolve(), demo=options.demo.resolve(), site=options.site, quick=options.quick)
    return study, rows, seeds


def do_row(study: OneSite, row: str, seed: int) -> None:
    """Trains and evaluates a row and whatever it starts from, and writes its outcome."""
    logger.info("=== seed %d, row %s: %s", seed, row, ROWS[row])
    prepare(study)
    recipe = study.recipe(row, seed)
    report = _train(recipe["base"])
    if recipe["training"] is not None:
        report = _train(recipe["training"])
    else:
        base = study.weights("base", BASE_SEED)
        model = with_plan(from_pretrained(base), study.sites(row))
        save_pretrained(model, study.weights(row, seed), tokenizer=load_tokenizer(base))
    scores = run_evaluation(parse_config(EvaluateConfig, study.evaluation(row, seed)), _answer_here)
    gates = gate_values(from_pretrained(study.weights(row, seed)))
    outcome = {**recipe, "report": report, "gates": gates, "scores": scores}
    storage.write_json(str(study.run_folder(row, seed) / "outcome.json"), outcome)
    logger.info("seed %d, row %s: %s", seed, row, {task: _value(scores[task]) for task in TASKS})


def prepare(study: OneSite) -> None:
    """Generates the corpus and the base's start: the demo's weights for one token per frame, without sites."""
    make_short_clips(study.folder / "corpus", study.demo, study.clips)
    start, trained = study.folder / "start", study.demo / "runs" / "tiny" / "weights" / "instruct"
    if start.is_dir():
        return
    if not trained.is_dir():
        raise ValueError(f"there are no weights at {trained}; run `timeviper demo`, or name its folder by --demo")
    model = with_plan(from_pretrained(trained), ())
    model.config = replace(model.config, vision=replace(model.config.vision, num_tokens_per_frame=1))
    save_pretrained(model, start, tokenizer=load_tokenizer(trained))


def _train(values: dict[str, Any]) -> dict[str, Any]:
    """Trains, or continues a run, and returns its report. Raises ValueError for a run of another recipe."""
    folder = Path(values["runs"]) / values["name"]
    recipe, report = folder / "recipe.json", folder / "report.json"
    if recipe.is_file() and _read_json(recipe) != values:
        raise ValueError(f"{folder} is of another recipe; remove it, or take another --folder")
    storage.write_json(str(recipe), values)
    if not report.is_file():
        train_local(parse_config(TrainConfig, values))
    return dict(_read_json(report)["instruct"])


def gate_values(model: TimeViper) -> list[float]:
    return [round(math.tanh(value.item()), 4) for name, value in model.named_parameters() if name.endswith(".alpha")]


def _answer_here(questions: Sequence[Question], config: EvaluateConfig) -> Iterator[list[Outcome]]:
    evaluator = Evaluator(weights_folder=config.weights, feature_store=config.feature_store, config=config.answering)
    for first in range(0, len(questions), BATCH_QUESTIONS):
        yield evaluator.evaluate(questions[first : first + BATCH_QUESTIONS])


def read_row(study: OneSite, row: str, seed: int) -> dict[str, Any] | None:
    """Outcome of a finished row, else None. Raises ValueError if it is of another recipe."""
    file = study.run_folder(row, seed) / "outcome.json"
    if not file.is_file():
        return None
    outcome: dict[str, Any] = _read_json(file)
    recipe = study.recipe(row, seed)
    if {name: outcome[name] for name in recipe} != recipe:
        raise ValueError(f"{file} is of another recipe; remove {file.parent}, or take another --folder")
    return outcome


def format_table(study: OneSite, rows: Sequence[str], seeds: Sequence[int]) -> str:
    """Markdown table of finished rows.

    Scores: mean over seeds (95 % interval by video); each seed's. Differences: mean (95 % interval over seeds).
    """
    heads = ["row", "site (layer: kept)", *TITLES.values(), f"mIoU less {BASELINE}'s", "tanh(alpha)"]
    lines = [table_line(heads), table_line(["---"] * len(heads))]
    for row in rows:
        own_seeds = seeds[:1] if row in UNTRAINED else seeds
        outcomes = {seed: outcome for seed in own_seeds if (outcome := read_row(study, row, seed)) is not None}
        if outcomes:
            scores = [_scores(study, row, list(outcomes), task) for task in TASKS]
            gates = ", ".join(f"{gate:.2f}" for outcome in outcomes.values() for gate in outcome["gates"])
            sites, difference = describe_sites(study.sites(row)), _difference(study, row, seeds)
            lines.append(table_line([ROWS[row], sites, *scores, difference, gates or "-"]))
    return "\n".join(lines)


def _scores(study: OneSite, row: str, seeds: Sequence[int], task: str) -> str:
    by_seed = [_outcomes(study, row, seed, task) for seed in seeds]
    pairs = [pair for found in by_seed for pair in found]
    low, high = interval_by_video(mean_of([score for _, score in pairs]), [video for video, _ in pairs])
    means = [statistics.fmean(score for _, score in found) for found in by_seed]
    each = "; " + ", ".join(f"{mean:.3f}" for mean in means) if len(means) > 1 else ""
    return f"{statistics.fmean(means):.3f} ({low:.2f} - {high:.2f}){each}"


def _outcomes(study: OneSite, row: str, seed: int, task: str) -> list[tuple[str, float]]:
    """(video, score) of each question."""
    table = pq.read_table(study.run_folder(row, seed) / "scores.outcomes.parquet", columns=["task", "video", "score"])
    return [(each["video"], each["score"]) for each in table.to_pylist() if each["task"] == task]


def _difference(study: OneSite, row: str, seeds: Sequence[int]) -> str:
    values = []
    for seed in seeds:
        outcome, baseline = read_row(study, row, seed), read_row(study, BASELINE, seed)
        if outcome is not None and baseline is not None:
            values.append(outcome["scores"]["grounding"]["miou"] - baseline["scores"]["grounding"]["miou"])
    if row == BASELINE or not values:
        return "-"
    mean, interval = statistics.fmean(values), mean_interval(values)
    return f"{mean:+.3f}" + ("" if interval is None else f" ({interval[0]:+.3f} - {interval[1]:+.3f})")


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of 2 to 5 values by Student's t, else None."""
    quantile = T_95.get(len(values))
    if quantile is None:
        return None
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _value(scores: Mapping[str, Any]) -> float:
    return float(scores["accuracy"] if "accuracy" in scores else scores["miou"])
