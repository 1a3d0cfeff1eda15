"""The program `timeviper`: `timeviper COMMAND ...`, also as `python -m timeviper_platform.cli COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from timeviper_platform import __version__
from timeviper_platform.common.job import JobParser

COMMANDS = {
    "preprocess": "write features of videos and images",
    "convert": "convert annotations to training samples",
    "train": "train on features and samples",
    "export": "write a checkpoint as a weights folder",
    "evaluate": "score weights on questions",
    "analyze": "compute the paper's figures for weights",
    "serve": "serve weights over HTTP",
    "store": "inspect, verify or compact a feature store",
    "benchmark": "measure the figures of the documents",
    "ablation": "measure the effect of TransV on the synthetic corpus",
    "demo": "run the whole platform on generated videos, on this machine",
    "doctor": "check this machine and what a run needs",
    "render": "write manifests, dashboards and a launcher file from one file of values",
}
"""Modules of this package by the name of their command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; 2 for a wrong command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    names = "\n".join(f"  {name:12}{text}" for name, text in COMMANDS.items())
    parser = JobParser(f"{(__doc__ or '').splitlines()[0]}\n\ncommands:\n{names}", prog="timeviper")
    parser.add_argument("--version", action="version", version=f"timeviper {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="COMMAND --help lists its keys")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    options = parser.parse_args(given)
    # only the chosen command is imported: a GPU machine may have neither Ray nor video decoders
    command = importlib.import_module(f"timeviper_platform.cli.{options.command}")
    return int(command.main(options.arguments))


if __name__ == "__main__":
    sys.exit(main())
