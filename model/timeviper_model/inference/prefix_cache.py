"""Video-prefix cache: model states after a video, before any question.

Evicts the least recently used entries. While one request computes an entry, others with its key wait. A key must
identify tenant, system text, media, frame selection, encoder and merge.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from timeviper_model.inference.prefill import PrefixEntry


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

    def peek(self, key: Hashable) -> PrefixEntry | None:
        return self._entries.get(key)

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

    def drop_idle(self) -> int:
        """Evicts every entry that no request uses; returns their number."""
        idle = [key for key in self._entries if not self._pins.get(key)]
        for key in idle:
            self.num_bytes -= self._entries.pop(key).num_bytes
        self.num_evictions += len(idle)
        return len(idle)

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
