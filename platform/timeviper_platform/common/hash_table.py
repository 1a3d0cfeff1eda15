"""A table of 64-bit keys and values in sorted NumPy runs, 16 bytes per entry.

n random keys collide with probability n * n / 2**65.
"""

from __future__ import annotations

import numpy as np


class HashTable:
    """The first value of a key stays."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # each sorted by key, each more than twice the next

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._runs)

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Adds (n,) uint64 keys and values."""
        keys, first = np.unique(keys, return_index=True)
        is_new = ~self.find(keys)[0]
        if not is_new.any():
            return
        self._runs.append((keys[is_new], values[first[is_new]]))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            last, before = self._runs.pop(), self._runs.pop()
            merged = np.concatenate([before[0], last[0]])
            order = np.argsort(merged, kind="stable")  # linear on two sorted halves
            self._runs.append((merged[order], np.concatenate([before[1], last[1]])[order]))

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (n,) bool, which keys exist, and (n,) uint64 values, 0 for missing keys."""
        found = np.zeros(len(keys), dtype=bool)
        values = np.zeros(len(keys), dtype=np.uint64)
        for run_keys, run_values in self._runs:
            positions = np.minimum(np.searchsorted(run_keys, keys), len(run_keys) - 1)
            here = run_keys[positions] == keys
            found |= here
            values[here] = run_values[positions[here]]
        return found, values
