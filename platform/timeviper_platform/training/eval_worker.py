"""Validates a committed checkpoint in its own process. Does not import Ray.

Reads a pickled EvalTask from standard input, writes metrics as JSON, and exits when standard input ends.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading

import torch

from timeviper_model.layers.backends import set_backend
from timeviper_model.weights.weights_folder import TOKENIZER_FILES, load_tokenizer
from timeviper_platform.common.devices import torch_dtype
from timeviper_platform.common.logs import setup_logging
from timeviper_platform.common.machine_cache import local_copy
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.checkpoint.export import checkpoint_model
from timeviper_platform.training.checkpoint.manager import is_committed
from timeviper_platform.training.phase import build_standalone_validator
from timeviper_platform.training.step import TrainContext
from timeviper_platform.training.validation.async_eval import EvalTask

NICENESS = 10


def evaluate_checkpoint(task: EvalTask) -> dict[str, float]:
    """Raises ValueError if the checkpoint is gone or incomplete, RuntimeError if files cannot be read."""
    config, phase = task.config, task.config.phases[task.phase]
    assert phase.validation is not None
    if not is_committed(task.checkpoint):
        raise ValueError(
            f"{task.checkpoint} is gone: validation takes longer than training until its next"
            f" {config.checkpoint.keep} checkpoints; raise validation.every_steps or checkpoint.keep"
        )
    torch.set_num_threads(config.workers.threads_per_worker)
    use_gpu = phase.validation.resources.get("GPU", 0) > 0
    context = TrainContext(
        device=torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_gpu else torch.device("cpu"),
        dtype=torch_dtype(config.dtype),
        use_transv=phase.use_transv,
    )
    _, _, model = checkpoint_model(task.checkpoint)
    model = model.to(context.device, context.dtype).eval()
    set_backend(model, config.backend if use_gpu else "torch", device=context.device, dtype=context.dtype)
    store = FeatureStore.open(config.feature_store, cache_bytes=config.loader.cache_bytes)
    validator = build_standalone_validator(
        phase, model.config, store, load_tokenizer(local_copy(config.tokenizer, TOKENIZER_FILES))
    )
    return validator.validate(model, model, context)


class EvalProcess:
    def __init__(self, task: EvalTask) -> None:
        # not a rank of the launcher's group; LOCAL_RANK selects rank 0's GPU
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "timeviper_platform.training.eval_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(pickle.dumps(task))
        self._process.stdin.flush()

    def metrics(self) -> dict[str, float] | None:
        code = self._process.poll()
        if code is None:
            return None
        assert self._process.stdout is not None
        lines = self._process.stdout.read().decode().splitlines()
        if not lines:
            raise RuntimeError(f"its process ended with exit code {code}")
        answer = json.loads(lines[-1])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        metrics: dict[str, float] = answer
        return metrics

    def close(self) -> None:
        with self._process as process:
            process.kill()


def main() -> int:
    setup_logging(logging.WARNING)
    task: EvalTask = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_exit_with_input, name="parent", daemon=True).start()
    os.nice(NICENESS)
    try:
        answer: dict[str, float] | dict[str, str] = evaluate_checkpoint(task)
    except (ValueError, RuntimeError, OSError) as error:
        answer = {"error": str(error)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    return int("error" in answer)


def _exit_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
