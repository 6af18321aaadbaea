"""Taking tokens back out of a state: a snapshot some tokens back, and the tokens since.

A state is a sum, but with a decay nothing can be subtracted from it again without dividing by a vanishing weight. So the state
is replayed from the snapshot instead; what is kept is bounded, whatever the length of the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .forms import State, Tokens

KEPT_TOKENS = 256  # more than assisted decoding drafts at once; twice as many are held before the oldest are folded in


@dataclass
class RecentTokens:
    """The state before some recent tokens, those tokens, and how a state takes them in."""

    state: State | None  # None: no token came before
    advance: Callable[[State | None, Tokens], State]
    tokens: Tokens = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.tokens["real"].shape[2]

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*(self.state or {}).values(), *self.tokens.values()))

    def append(self, tokens: Tokens, real: Tensor | None) -> None:
        """Adds tokens at the end, `real` (B, N) False at padding, and folds the oldest into the state once there are too many."""
        some = next(iter(tokens.values()))
        if real is None:
            real = torch.ones(some.shape[0], some.shape[2], dtype=torch.bool, device=some.device)
        new = {name: tensor.detach() for name, tensor in (tokens | {"real": real[:, None]}).items()}
        self.tokens = {name: torch.cat([self.tokens[name], new[name]], 2) for name in new} if self.tokens else new
        if self.count > 2 * KEPT_TOKENS:
            self.state = self.after(self.count - KEPT_TOKENS)
            self.tokens = {name: tensor[:, :, -KEPT_TOKENS:].clone() for name, tensor in self.tokens.items()}

    def after(self, count: int) -> State | None:
        """The state after the first `count` recent tokens."""
        if count == 0:
            return self.state
        with torch.no_grad():
            return self.advance(self.state, {name: tensor[:, :, :count] for name, tensor in self.tokens.items()})

    def padding(self, count: int) -> Tensor:
        """Which of the last `count` tokens are padding, bool (B, count)."""
        return ~self.tokens["real"][:, 0, self.count - count :]

    def drop(self, count: int) -> State | None:
        """Forgets the last `count` tokens; returns the state before them, None if nothing came before."""
        kept = self.count - count
        self.tokens = {name: tensor[:, :, :kept] for name, tensor in self.tokens.items()}
        return self.after(kept)

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a selection of sequences to every tensor."""
        if self.state is not None:
            self.state = {name: function(tensor) for name, tensor in self.state.items()}
        self.tokens = {name: function(tensor) for name, tensor in self.tokens.items()}
