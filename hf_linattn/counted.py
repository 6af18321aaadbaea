"""Which tokens a state has left out, remembered as one number a sequence.

A state cannot take a token out again, so a later mask must agree with what was counted. Comparing needs no list of tokens: every
column of the text has a fixed pseudo-random number, and the sum over the columns left out tells their pattern apart from every other
one, that of a pad that moved included, but for one chance in 2^31.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRIME = 2**31 - 1
SAYS_NOTHING = -1


def digest(left_out: Tensor, first: int | Tensor = 0) -> Tensor:
    """int64 (B,), from 0 to 2^31 - 2: the sum modulo a prime over the columns where `left_out`, bool (B, n), holds.

    `first` is the index in the whole text of the first of the n columns; digests of two parts of a text add up, modulo PRIME.
    """
    numbers = (torch.arange(1, left_out.shape[-1] + 1, device=left_out.device) + first) * 48271 % PRIME
    numbers = (numbers ^ (numbers >> 15)) * 40692 % PRIME
    numbers = numbers * numbers % PRIME  # else sums of neighbours would often be equal
    return torch.where(left_out, numbers, 0).sum(-1) % PRIME


def joined(one: Tensor, other: Tensor) -> Tensor:
    """The digest of two parts of a text; `-other` takes a part away again."""
    return (one + other) % PRIME
