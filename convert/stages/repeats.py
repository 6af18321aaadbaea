"""Rows in which something comes again: what a model of text sees too seldom to learn recall from."""

from __future__ import annotations

import numpy as np

SHORTEST, LONGEST = 24, 96
"""Tokens of a stretch."""
STRETCHES = 3
"""Of a row."""
_OF = 16


def with_repeats(rows: np.ndarray, repeat: int, seed: int, number: int) -> np.ndarray:
    """Rows (B, N) of which `repeat` in 16 have three stretches of their own tokens copied to a later place.

    Args:
        seed, number: decide which; the number of the batch in the run.

    Raises:
        ValueError: the rows are shorter than two of the shortest stretches.
    """
    if rows.shape[1] < 2 * SHORTEST:
        raise ValueError(f"rows of {rows.shape[1]} tokens are too short to repeat stretches of {SHORTEST}")
    chance = np.random.default_rng([seed, number, _OF])
    rows = rows.copy()
    for index, row in enumerate(rows):
        if (number * len(rows) + index) % _OF < repeat:
            for _ in range(STRETCHES):
                _repeat(row, chance)
    return rows


def _repeat(row: np.ndarray, chance: np.random.Generator) -> None:
    length = int(chance.integers(SHORTEST, min(LONGEST, len(row) // 2) + 1))
    begin = int(chance.integers(0, len(row) - 2 * length + 1))
    again = int(chance.integers(begin + length, len(row) - length + 1))
    row[again : again + length] = row[begin : begin + length]
