"""Taking tokens back out of a state: a snapshot some tokens back, and the keys and values since.

A state is a sum, but with a decay nothing can be subtracted from it again without dividing by a vanishing weight. So the state
is replayed from the snapshot instead; what is kept is bounded, whatever the length of the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .ops import linear_attention

KEPT_TOKENS = 256  # more than assisted decoding drafts at once; twice as many are held before the oldest are folded in


@dataclass(frozen=True)
class Recurrence:
    """How one layer's state moves over new tokens."""

    query_heads: int
    quadratic: bool
    normalize_qk: bool
    log_decay: Tensor | None  # (H,)

    def __call__(self, state: Tensor | None, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        """The state after keys (B, Hk, N, D) and values (B, Hk, N, Dv); `real` (B, N) is False at padding."""
        query = key.new_zeros(key.shape[0], self.query_heads, *key.shape[2:])
        _, after = linear_attention(
            query, key, value, 1.0, 0.0, 0.5 if self.quadratic else 0.0, normalize_qk=self.normalize_qk, log_decay=self.log_decay,
            segment_ids=real, initial_state=state, return_state=True,
        )  # fmt: skip
        return after


@dataclass
class RecentTokens:
    """The state before some recent tokens, and those tokens."""

    state: Tensor | None  # None: no token came before
    recurrence: Recurrence
    key: Tensor | None = None  # (B, Hk, n, D)
    value: Tensor | None = None  # (B, Hk, n, Dv)
    real: Tensor | None = None  # (B, n) bool

    @property
    def count(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def append(self, key: Tensor, value: Tensor, real: Tensor | None) -> None:
        """Adds tokens at the end, and folds the oldest into the state once there are too many."""
        if real is None:
            real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        parts = [(self.key, key, 2), (self.value, value, 2), (self.real, real, 1)]
        joined = [new.detach() if old is None else torch.cat([old, new.detach()], dim) for old, new, dim in parts]
        self.key, self.value, self.real = joined
        if self.count > 2 * KEPT_TOKENS:
            self.state = self.after(self.count - KEPT_TOKENS)
            self.key, self.value = (x[:, :, -KEPT_TOKENS:].clone() for x in (self.key, self.value))
            self.real = self.real[:, -KEPT_TOKENS:].clone()

    def after(self, count: int) -> Tensor | None:
        """The state after the first `count` recent tokens."""
        if count == 0 or self.key is None or self.value is None or self.real is None:
            return self.state
        with torch.no_grad():
            return self.recurrence(self.state, self.key[:, :, :count], self.value[:, :, :count], self.real[:, :count])

    def drop(self, count: int) -> Tensor | None:
        """Forgets the last `count` tokens; returns the state before them, None if nothing came before."""
        kept = self.count - count
        if self.key is not None and self.value is not None and self.real is not None:
            self.key, self.value, self.real = self.key[:, :, :kept], self.value[:, :, :kept], self.real[:, :kept]
        return self.after(kept)

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a selection of sequences to every tensor."""
        for name in ("state", "key", "value", "real"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor))
