"""Processes that tests kill, forked from a server that has imported all: imports take longer than what they do."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

_LATE_IMPORTS = (  # at the first use of DeepSpeed, AdamW, tokenizers, encoders and pyarrow: 4 s of a training rank
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "pandas",
    "pyarrow.dataset",
    "torch._dynamo",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.siglip.modeling_siglip",
)


def context() -> ForkServerContext:
    """One list for all: a process has one server, and the first test that uses it decides what it imports.

    The server keeps the environment of that test.
    """
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["reference.training_ranks", "reference.killable", *_LATE_IMPORTS])
    return found
