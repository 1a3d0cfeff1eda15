"""Imports DeepSpeed once in the fork server of training ranks."""

from __future__ import annotations

from timeviper_platform.training.optim.deepspeed_engine import import_deepspeed

import_deepspeed()
