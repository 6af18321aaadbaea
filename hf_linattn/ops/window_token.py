"""What one new token of a window brings, and what lies beside the window, in the one form that the operator takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Token(NamedTuple):
    """One new token a sequence."""

    query: Tensor  # (B, Hq, 1, D)
    key: Tensor  # (B, Hk, 1, D)
    value: Tensor  # (B, Hk, 1, Dv)
    real: Tensor | None = None  # bool (B, 1), False where a sequence has none
    scaling: float | None = None  # of the scores; None: D ** -0.5


class Beside(NamedTuple):
    """Linear attention over the tokens that have left a window; without a state there is none."""

    state: Tensor | None = None  # (B, Hs, F, Dv + 1), Dv + 2 with an input gate
    gate: Tensor | None = None  # (Hq,) or (B, Hq, 1): the window's share of the output
    coefficients: Tensor | None = None  # (4, Hq): rows a, b, c, temperature
    log_decay: Tensor | None = None  # (Hs,), or (B, Hk, 1) of the new token
    log_input_gate: Tensor | None = None  # (B, Hk, 1) of the new token, or (Hk,)
    query_matrix: Tensor | None = None  # (Hq, D, r), in the dtype of the query
    key_matrix: Tensor | None = None  # (Hk, D, r)
    key_center: Tensor | None = None  # (Hk, 1, D), taken from keys first
    output_power: Tensor | None = None  # (Hq,)
    output_log_scale: Tensor | None = None  # (Hq,)
    output_gate: Tensor | None = None  # (B, Hq, 1) or (Hq,)
    degree: int = 1
    normalize_qk: bool = True
    is_map: bool = False  # features are softmax([x W, -x W]), else x W

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:11]  # type: ignore[return-value]

    @property
    def decays_per_token(self) -> bool:
        return self.log_decay is not None and self.log_decay.dim() == 3

    @property
    def gated_per_token(self) -> bool:
        return self.log_input_gate is not None and self.log_input_gate.dim() == 3

    @property
    def kept(self) -> Tensor | None:
        """What is kept of the new token beside its key and value, (B, n Hk, 1)."""
        own = [x for x in (self.log_decay, self.log_input_gate) if x is not None and x.dim() == 3]
        return torch.cat(own, 1) if own else None

    def of_the_kept(self, kept: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """log_decay (B, Hk, 1), where tokens have their own, and log_input_gate of a token of which `kept` was kept."""
        own = [] if kept is None else list(kept.chunk(self.decays_per_token + self.gated_per_token, 1))
        decay = own.pop(0) if self.decays_per_token else None
        return decay, own[0] if self.gated_per_token else self.log_input_gate
