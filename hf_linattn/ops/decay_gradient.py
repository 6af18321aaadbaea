"""The gradient of log_decay, token by token.

log_decay of token t weighs every pair that it lies between, n < t <= i, so its gradient is the sum of A_in dA_in over those pairs. As a
running sum of what each column gives, from the end of the sequence to its start, that would carry the rounding of every token to all
before it, where most of it cancels in exact arithmetic. So each chunk is summed on its own, from four kinds of pairs:

    n before the chunk, i behind it    one number a chunk: the state ahead of it against the gradient of the state behind it
    n before the chunk, i inside       rows t and later
    n inside, i behind the chunk       columns before t
    both formed one by one             rows less columns, t and later; of the same numbers, so that a pair beside t cancels exactly
"""

from __future__ import annotations

import torch
from torch import Tensor


def from_t_on(x: Tensor) -> Tensor:
    """At each t the sum over t and later, along the last dimension."""
    return x.flip(-1).cumsum(-1).flip(-1)


class DecayGradient:
    """Gathers the gradient (B, Hs, N) in float64 while a backward pass goes over its chunks, first forward and then backward.

    `states` holds the state ahead of every `stride`-th chunk, from which those ahead of the others are made again: about the square root
    of all are kept at once.
    """

    def __init__(self, query: Tensor, state_heads: int, length: int, chunks: int) -> None:
        self.carried = query.new_zeros(query.shape[0], state_heads, length, dtype=torch.float64)  # first what each row is carried
        self.beside = torch.zeros_like(self.carried)
        self.stride = max(1, int(chunks**0.5))
        self.states: dict[int, Tensor] = {}

    def rows_carried(self, rows: slice, phi: Tensor, grad_phi: Tensor) -> None:
        """What these rows are given by the state ahead of their chunk: phi and its gradient, (B, Hs, r, C, F)."""
        self.carried[..., rows] = (phi * grad_phi).sum((2, -1), dtype=torch.float64)

    def columns_carry(self, columns: slice, values: Tensor, grad_values: Tensor, state: Tensor, reverse: Tensor) -> None:
        """What these columns give behind their chunk, by [v, 1] and its gradient (B, Hs, C, Dv + 1), and what goes across it.

        `state` is that ahead of the chunk, `reverse` the gradient that what is left of it behind the chunk has.
        """
        given = (values * grad_values).sum(-1, dtype=torch.float64)
        across = (state * reverse).sum((-2, -1), dtype=torch.float64)
        self.carried[..., columns] = from_t_on(self.carried[..., columns]) + given.cumsum(-1) - given + across[..., None]

    def pairs(self, rows: slice, columns: slice, products: Tensor) -> None:
        """A_in dA_in (B, Hs, r, C, C') of pairs that are formed one by one."""
        products = products.sum(2)
        self.beside[..., rows] += products.sum(-1, dtype=torch.float64)
        self.beside[..., columns] -= products.sum(-2, dtype=torch.float64)

    def total(self) -> Tensor:
        return self.carried + from_t_on(self.beside)
