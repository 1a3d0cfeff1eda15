"""Video-prefix cache: model states after a video, before any question.

Evicts the least recently used entries. While one request computes an entry, others with its key wait. A key must
identify tenant, system text, media, frame selection, encoder and merge.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch

from timeviper_model.config import HybridConfig, TimeViperConfig
from timeviper_model.inference.chunked_transv import plan_sites
from timeviper_model.inference.prefill import PrefixEntry


def prefix_entry_bytes(config: TimeViperConfig, num_system: int, num_vision: int, *, dtype: torch.dtype) -> int:
    """Bytes of an entry; 2.63 GB for the 9B, the paper's plan, 10,000 frames of 16 tokens and bfloat16."""
    text, size = config.text, dtype.itemsize
    kv_bytes = 2 * text.num_key_value_heads * text.head_dim * size
    state_size = 8 if dtype == torch.float64 else 4
    mamba_bytes = 0
    if isinstance(text, HybridConfig):
        window, state = (text.conv_kernel - 1) * text.conv_dim, text.mamba_intermediate_size * text.ssm_state_size
        mamba_bytes = window * size + state * state_size
    plans = plan_sites(config, num_vision)
    total, present = 0, num_vision
    for layer, block_type in enumerate(text.block_types):
        plan = plans.get(layer)
        transfers = plan is not None and plan.site.transfer == "cross_attention"
        if plan is not None and plan.waits:
            waiting = num_system + plan.num_present
            total += waiting * (text.hidden_size * size + kv_bytes // 2 + 8 + 1)  # state, score key, position, kind
            return total + plan.num_present * kv_bytes * transfers
        if plan is not None:
            total += plan.num_sources * kv_bytes
            present = plan.num_kept
        if block_type == "attention":
            total += (num_system + present) * kv_bytes
        elif block_type == "mamba":
            total += mamba_bytes
    return total


class PrefixCache:
    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = self.num_misses = self.num_evictions = 0
        self._entries: OrderedDict[Hashable, PrefixEntry] = OrderedDict()
        self._pins: dict[Hashable, int] = {}
        self._computing: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def is_computing(self, key: Hashable) -> bool:
        return key in self._computing

    def lease(self, key: Hashable) -> PrefixLease:
        """Pins the entry; on a miss, reserves the key. Raises RuntimeError while the key is reserved."""
        if key in self._computing:
            raise RuntimeError("another request is computing this prefix; check is_computing() first")
        entry = self._entries.get(key)
        if entry is None:
            self.num_misses += 1
            self._computing.add(key)
        else:
            self.num_hits += 1
            self._entries.move_to_end(key)
            self._pins[key] = self._pins.get(key, 0) + 1
        return PrefixLease(self, key, entry)

    def _put(self, key: Hashable, entry: PrefixEntry) -> bool:
        """Returns False when pinned entries leave no room."""
        idle = [other for other in self._entries if not self._pins.get(other)]
        in_use = self.num_bytes - sum(self._entries[other].num_bytes for other in idle)
        if in_use + entry.num_bytes > self.max_bytes:
            return False
        for other in idle:
            if self.num_bytes + entry.num_bytes <= self.max_bytes:
                break
            self.num_bytes -= self._entries.pop(other).num_bytes
            self.num_evictions += 1
        self._entries[key] = entry
        self._pins[key] = 1
        self.num_bytes += entry.num_bytes
        return True

    def _unpin(self, key: Hashable) -> None:
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]


class PrefixLease:
    """A request's hold on an entry that it found or computes."""

    def __init__(self, cache: PrefixCache, key: Hashable, entry: PrefixEntry | None) -> None:
        self._cache, self._key = cache, key
        self.entry = entry
        """Entry found, or None on a miss."""
        self._is_computing = entry is None
        self._is_pinned = entry is not None

    def publish(self, entry: PrefixEntry) -> None:
        """Stores the computed entry if it is finite and fits."""
        self._cache._computing.discard(self._key)
        self._is_computing = False
        self._is_pinned = entry.is_finite and self._cache._put(self._key, entry)

    def release(self) -> None:
        """Unpins the entry or the key. Safe to repeat."""
        if self._is_computing:
            self._cache._computing.discard(self._key)
        if self._is_pinned:
            self._cache._unpin(self._key)
        self._is_computing = self._is_pinned = False
