"""What the operators take, as one object: torch.library's schemas are flat, and right behind them a `Call` is made once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .features import feature_count

Forward = tuple[Tensor, Tensor, Tensor | None]  # out, mass and, where it is asked for, the state
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # of a call's tensors that have one, in their order

TENSORS = 10  # of a call's fields, the first ones
OF_A_STEP = 6  # of these, those of a few new tokens, whose segments are the same on both sides


class Call(NamedTuple):
    """One call of the operator, in the canonical form that `operators` describes and `functional` prepares."""

    query: Tensor  # (B, Hq, N, D)
    key: Tensor  # (B, Hk, N, D)
    value: Tensor  # (B, Hk, N, Dv)
    coefficients: Tensor  # (4, Hq): rows a, b, c, temperature
    log_decay: Tensor | None = None  # (Hs,) or (B, Hs, N)
    query_segments: Tensor | None = None  # (B, N) int32
    key_segments: Tensor | None = None
    initial_state: Tensor | None = None  # (B, Hs, F, Dv + 1)
    dropout_p: Tensor | None = None  # without dimensions, as is the seed
    seed: Tensor | None = None
    degree: int = 1
    causal: bool = True
    normalize_qk: bool = True

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:TENSORS]  # type: ignore[return-value]

    @property
    def tensors_of_a_step(self) -> tuple[Tensor | None, ...]:
        return self[:OF_A_STEP]  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Of sums, masses and states."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def state_heads(self) -> int:
        """Heads of the state: the key heads, or the query heads where each has a decay of its own."""
        if self.log_decay is None:
            return self.key.shape[1]
        return self.log_decay.shape[-2 if self.log_decay.dim() == 3 else 0]

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        return self.query.shape[0], self.state_heads, feature_count(self.query.shape[-1], self.degree), self.value.shape[-1] + 1

    def empty_out(self) -> Tensor:
        """An uninitialised (B, Hq, N, Dv) in the memory order of `query`, so that Transformers' transpose back costs no copy."""
        batch, heads, length, _ = self.query.shape
        if self.query.stride(1) < self.query.stride(2):
            return self.query.new_empty(batch, length, heads, self.value.shape[-1]).transpose(1, 2)
        return self.query.new_empty(batch, heads, length, self.value.shape[-1])
