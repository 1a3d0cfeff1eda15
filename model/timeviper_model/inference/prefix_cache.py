"""Video-prefix cache: model states after a video, before any question.

Evicts the least recently used entries, to host memory if that has a budget. While one request computes an entry, others
with its key wait. A key must identify tenant, system text, media, frame selection, encoder and merge.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch

from timeviper_model.inference.prefill import PrefixEntry


class PrefixCache:
    def __init__(self, max_bytes: int, *, max_host_bytes: int = 0, device: torch.device | str = "cpu") -> None:
        """Keeps up to `max_bytes` on `device`, and what is evicted from there up to `max_host_bytes` in host memory."""
        self.max_bytes, self.max_host_bytes = max_bytes, max_host_bytes
        self.num_bytes = self.num_host_bytes = 0
        self.num_hits = self.num_misses = self.num_evictions = 0
        self.num_host_hits = 0
        """Those of `num_hits` that were restored from host memory."""
        self._device = device
        self._entries: OrderedDict[Hashable, PrefixEntry] = OrderedDict()
        self._host: OrderedDict[Hashable, PrefixEntry] = OrderedDict()
        self._pins: dict[Hashable, int] = {}
        self._computing: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_host_entries(self) -> int:
        return len(self._host)

    def is_computing(self, key: Hashable) -> bool:
        return key in self._computing

    def shared_bytes(self, key: Hashable) -> int:
        """Bytes that a prompt with this key shares with its entry while it is read."""
        entry = self._entries.get(key) or self._host.get(key)
        return entry.working_bytes if entry is not None and (key in self._entries or self._has_room(entry)) else 0

    def lease(self, key: Hashable) -> PrefixLease:
        """Pins the entry; on a miss, reserves the key. Raises RuntimeError while the key is reserved.

        An entry in host memory is copied back; if pinned ones leave it no room, only for this lease.
        """
        if key in self._computing:
            raise RuntimeError("another request is computing this prefix; check is_computing() first")
        entry = self._entries.get(key)
        if entry is None and key in self._host:
            saved = self._host[key]
            entry = saved.to(self._device)
            self._drop_from_host(key)
            self.num_hits += 1
            self.num_host_hits += 1
            is_pinned = self._put(key, entry)
            if not is_pinned:
                self._to_host(key, saved)
            return PrefixLease(self, key, entry, is_pinned=is_pinned)
        if entry is None:
            self.num_misses += 1
            self._computing.add(key)
        else:
            self.num_hits += 1
            self._entries.move_to_end(key)
            self._pins[key] = self._pins.get(key, 0) + 1
        return PrefixLease(self, key, entry, is_pinned=entry is not None)

    def drop_idle(self) -> int:
        """Evicts every entry that no request uses; returns their number."""
        idle = [key for key in self._entries if not self._pins.get(key)]
        for key in idle:
            self._evict(key)
        return len(idle)

    def _put(self, key: Hashable, entry: PrefixEntry) -> bool:
        """Returns False when pinned entries leave no room."""
        if not self._has_room(entry):
            return False
        for other in [other for other in self._entries if not self._pins.get(other)]:
            if self.num_bytes + entry.num_bytes <= self.max_bytes:
                break
            self._evict(other)
        self._entries[key] = entry
        self._pins[key] = 1
        self.num_bytes += entry.num_bytes
        return True

    def _has_room(self, entry: PrefixEntry) -> bool:
        """Whether the entry fits together with those in use."""
        in_use = sum(other.num_bytes for key, other in self._entries.items() if self._pins.get(key))
        return in_use + entry.num_bytes <= self.max_bytes

    def _evict(self, key: Hashable) -> None:
        entry = self._entries.pop(key)
        self.num_bytes -= entry.num_bytes
        self.num_evictions += 1
        self._to_host(key, entry)

    def _to_host(self, key: Hashable, entry: PrefixEntry) -> None:
        if entry.num_bytes > self.max_host_bytes:
            return
        while self.num_host_bytes + entry.num_bytes > self.max_host_bytes:
            self._drop_from_host(next(iter(self._host)))
        self._host[key] = entry.to("cpu")
        self.num_host_bytes += entry.num_bytes

    def _drop_from_host(self, key: Hashable) -> None:
        self.num_host_bytes -= self._host.pop(key).num_bytes

    def _unpin(self, key: Hashable) -> None:
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]


class PrefixLease:
    """A request's hold on an entry that it found or computes."""

    def __init__(self, cache: PrefixCache, key: Hashable, entry: PrefixEntry | None, *, is_pinned: bool) -> None:
        self._cache, self._key = cache, key
        self.entry = entry
        """Entry found, or None on a miss."""
        self._is_computing = entry is None
        self._is_pinned = is_pinned

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
