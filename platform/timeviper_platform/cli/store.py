"""Maintains a feature store: `timeviper store inspect|verify|compact URI`, and estimates a large one: `scale`.

`inspect` prints the contents. `verify` checks every row and exits with 1 if any is bad. `compact` merges small data
files; readers may continue, writers may not. `scale` computes totals from unit costs (docs/scale.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields

from timeviper_platform.common.config_docs import field_docs
from timeviper_platform.common.job import JobParser, JobResult, run_job
from timeviper_platform.data.preprocess.cost_model import ScaleConfig, scale_table
from timeviper_platform.data.store.compact import DEFAULT_FILE_BYTES, compact
from timeviper_platform.data.store.inspect import inspect_store
from timeviper_platform.data.store.verify import verify_store
from timeviper_platform.data.store.writer import ROW_GROUP_BYTES


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("inspect", "print the contents"),
        ("verify", "check all rows"),
        ("compact", "merge small files"),
    ):
        command = commands.add_parser(name, description=text, help=text)
        command.add_argument("uri", help="the store's folder, local or any fsspec URI")
        if name == "compact":
            megabytes = DEFAULT_FILE_BYTES >> 20
            command.add_argument("--file-mb", type=int, default=megabytes, help=f"size of a merged file ({megabytes})")
            kilobytes = ROW_GROUP_BYTES >> 10
            text = f"size of row groups: execution.row_group_bytes / 1024 of the run that wrote the store ({kilobytes})"
            command.add_argument("--row-group-kb", type=int, default=kilobytes, help=text)
    scale = commands.add_parser("scale", description=scale_table.__doc__, help="estimate a large run")
    scale.add_argument("--num-videos", type=int, nargs="+", default=[1_000_000, 10_000_000])
    docs = field_docs(ScaleConfig)
    for item in fields(ScaleConfig):
        if item.name != "num_videos":
            text = f"{docs.get(item.name, '')} (default: {item.default})".strip().replace("%", "%%")
            option = f"--{item.name.replace('_', '-')}"
            scale.add_argument(option, type=type(item.default), default=item.default, help=text)
    return run_job(parser, run_command, arguments)


def run_command(options: argparse.Namespace) -> JobResult:
    match options.command:
        case "scale":
            values = {item.name: getattr(options, item.name) for item in fields(ScaleConfig)}
            rows = [ScaleConfig(**{**values, "num_videos": count}) for count in options.num_videos]
            return JobResult([scale_table(rows)])
        case "compact":
            sizes = {"file_bytes": options.file_mb << 20, "row_group_bytes": options.row_group_kb << 10}
            return JobResult(compact(options.uri, **sizes).lines())
        case "inspect":
            return JobResult(inspect_store(options.uri).lines())
        case _:
            report = verify_store(options.uri)
            return JobResult(report.lines(), exit_code=1 if report.problems else 0)
