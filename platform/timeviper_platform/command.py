"""The command line that jobs share: `--config FILE [key=value ...]` to a configuration, its work, and what to print.

Knows arguments, exit codes and which errors are the user's or the world's; not what a job does. Prints nothing itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from timeviper_platform.config import load_config
from timeviper_platform.logs import setup_logging

Config = TypeVar("Config")


class CommandResult(NamedTuple):
    """What a job has to say, and its exit code; the lines of a code other than 0 belong on standard error."""

    text: str
    exit_code: int


def run_command(
    arguments: Sequence[str] | None,
    config_class: type[Config],
    work: Callable[[Config], Iterable[str]],
    *,
    description: str | None,
    config_file: str,
    override: str,
) -> CommandResult:
    """Loads the configuration that the arguments name and works on it.

    Args:
        arguments: None = the process' own.
        config_class: what the file holds.
        work: gives the lines to print; a ValueError or RuntimeError becomes one line and exit code 1.
        description: for `--help`.
        config_file: an example of a file.
        override: an example of `key=value`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help=f"YAML file, see {config_file}")
    parser.add_argument("overrides", nargs="*", help=f"key=value, e.g. {override}")
    options = parser.parse_args(arguments)
    setup_logging()
    try:
        return CommandResult("\n".join(work(load_config(config_class, options.config, options.overrides))), 0)
    except (ValueError, RuntimeError) as error:
        return CommandResult(f"error: {error}", 1)
