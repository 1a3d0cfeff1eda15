"""Numbers painted into pictures as a 4 x 4 grid: white, black, then 14 bits, lowest first (white = 1)."""

from __future__ import annotations

import numpy as np


def painted(number: int, width: int = 160, height: int = 120) -> np.ndarray:
    """(height, width, 3) uint8"""
    bits = [1, 0, *(number >> bit & 1 for bit in range(14))]
    cells = 255 * np.array(bits, np.uint8).reshape(4, 4)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    return np.repeat(cells[rows][:, columns, None], 3, axis=2)


def read_number(frame: np.ndarray) -> int:
    """Returns the number in an upright (height, width, 3) frame. Raises ValueError without the first two cells."""
    height, width = frame.shape[:2]
    centres = frame[height // 8 :: height // 4, width // 8 :: width // 4].mean(axis=2)[:4, :4].reshape(-1)
    bits = (centres > 127).astype(int).tolist()
    if bits[:2] != [1, 0]:
        raise ValueError(f"no number is painted here: {centres.round().tolist()}")
    return sum(bit << place for place, bit in enumerate(bits[2:]))
