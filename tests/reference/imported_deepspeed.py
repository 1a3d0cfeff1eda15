"""DeepSpeed, imported at once: for the server from which training ranks are forked, where seconds are saved a rank."""

from __future__ import annotations

from timeviper_platform.training.optim.deepspeed_engine import import_deepspeed

import_deepspeed()
