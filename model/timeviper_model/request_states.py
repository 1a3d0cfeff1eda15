"""What an engine holds of a request while it waits, while its prompt is read, and while its answer is written.

Knows what belongs to each; not when a request goes from one to the next.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from timeviper_model.admission import PromptTensors
from timeviper_model.detokenize import TextStream
from timeviper_model.prefill import Prefill
from timeviper_model.prefix_cache import PrefixLease
from timeviper_model.requests import Request, RequestId


class Queued(NamedTuple):
    """A request without a slot."""

    id: RequestId
    request: Request
    prompt: PromptTensors
    prefix_length: int
    prefix_key: Hashable | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """A request in a slot whose prompt is being read."""

    id: RequestId
    request: Request
    slot: int
    prefill: Prefill
    lease: PrefixLease | None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that did not have to be read."""
        return 0 if self.lease is None or self.lease.entry is None else self.lease.entry.num_tokens


@dataclass(slots=True, eq=False)
class Running:
    """A request in a slot whose answer is being written."""

    id: RequestId
    request: Request
    cached_tokens: int
    generator: torch.Generator
    text: TextStream | None
    tokens: list[int] = field(default_factory=list)
