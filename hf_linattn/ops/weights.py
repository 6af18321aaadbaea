"""f(s) = a + b s + c s^2 and a decay as the operators take them, made of numbers or of tensors with one a head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .constants import constant
from .decay import canonical_decay

Coefficient = float | Tensor


class Weights(NamedTuple):
    """What need not be made again for every token where the numbers stay the same."""

    coefficients: Tensor  # (4, Hq): rows a, b, c, temperature
    degree: int
    normalize_qk: bool
    log_decay: Tensor | None  # (Hs,)


def weights_of(query: Tensor, key: Tensor, a: Coefficient, b: Coefficient, c: Coefficient, temperature: Coefficient, normalize_qk: bool,
               log_decay: Tensor | None) -> Weights:  # fmt: skip
    """For queries like `query`, (B, Hq, N, D), and keys like `key`; `log_decay` is the same for all tokens.

    Raises:
        ValueError, TypeError: as `linear_attention` does for these numbers.
    """
    checks.check_weights(a, b, c, temperature, query.shape[1], normalize_qk)
    decay = None if log_decay is None else canonical_decay(log_decay, query, key)
    return Weights(coefficients_of(query, a, b, c, temperature), degree_of(c), normalize_qk, decay)


def coefficients_of(query: Tensor, a: Coefficient, b: Coefficient, c: Coefficient, temperature: Coefficient) -> Tensor:
    """(4, Hq), float32 beside inputs of up to 32 bits."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads = query.shape[1]
    given = (a, b, c, temperature)
    numbers_alone = type(a) is type(b) is type(c) is type(temperature) is float
    if not numbers_alone and any(isinstance(x, Tensor) for x in given):
        return torch.stack([_row(x, heads, dtype, query.device) for x in given])
    if torch.compiler.is_compiling():
        return torch.stack([torch.full((heads,), float(x), dtype=dtype, device=query.device) for x in given])
    signature = (*(given if numbers_alone else map(float, given)), heads, dtype, query.device)
    return constant(signature, lambda: torch.tensor([[float(x)] * heads for x in given], dtype=dtype, device=query.device))


def _row(x: Coefficient, heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(heads,) of a number or of a tensor, which mostly is that already."""
    if isinstance(x, Tensor):
        x = x if x.dtype == dtype else x.to(dtype)
        return x if x.dim() and x.shape[0] == heads else x.expand(heads)
    make = lambda: torch.full((heads,), float(x), dtype=dtype, device=device)  # noqa: E731
    return make() if torch.compiler.is_compiling() else constant(("row", float(x), heads, dtype, device), make)


def degree_of(c: Coefficient) -> int:
    return 1 if not isinstance(c, Tensor) and c == 0 else 2
