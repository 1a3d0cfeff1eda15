"""Turns frames upright by their display matrix, in quarter turns and mirrors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Orientation(NamedTuple):
    """Steps from stored to upright pixels: swap axes, then reverse rows or columns."""

    swaps_axes: bool = False
    reverses_rows: bool = False
    reverses_columns: bool = False

    @property
    def counterclockwise_degrees(self) -> int | None:
        """0, 90, 180 or 270; None for mirror images."""
        if (self.reverses_rows != self.reverses_columns) != self.swaps_axes:
            return None
        return (90 if self.reverses_rows else 270) if self.swaps_axes else (180 if self.reverses_rows else 0)


UPRIGHT = Orientation()


def orientation_of(frame: Any) -> Orientation:
    """Reads the display matrix (ISO/IEC 14496-12).

    Rows (a, b, u) and (c, d, v) move column p, row q to column a p + c q, row b p + d q.
    """
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), b"")
    if len(matrix) != 9 * 4:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(True, b < 0, c < 0)
    return Orientation(False, d < 0, a < 0)


def turn_upright(pixels: np.ndarray, orientation: Orientation) -> np.ndarray:
    turned = pixels.swapaxes(0, 1) if orientation.swaps_axes else pixels
    return turned[:: -1 if orientation.reverses_rows else 1, :: -1 if orientation.reverses_columns else 1]
