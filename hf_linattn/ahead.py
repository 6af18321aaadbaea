"""What `generate` appends to a text's mask and positions at each token lies there already, and a token sees one column more of it.

Transformers makes six small kernels of it, two of which copy the whole text, at each token. Here a thousand columns are made at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

COLUMNS = 1024
AHEAD = "_linattn_ahead"
"""Of a tensor that is the first columns of a longer one: that one, as `Ahead`."""


class Ahead(NamedTuple):
    """Columns up to those of tokens to come, and how often they had been written when those were made."""

    columns: Tensor
    written: int


def ones(mask: Tensor, count: int) -> Tensor:
    """Of a padding mask (B, N), what tokens to come add to it: they are real."""
    return mask.new_ones(mask.shape[0], count)


def positions(before: Tensor, count: int) -> Tensor:
    """Of positions (B, N), those of tokens to come."""
    return before[:, -1:] + torch.arange(1, count + 1, dtype=before.dtype, device=before.device)


def one_more(before: Tensor, to_come: Callable[[Tensor, int], Tensor]) -> Tensor:
    """(B, N) and the next column, (B, N + 1). Somebody may have written into them, and then what is to come is made anew."""
    length = before.shape[1]
    known: Ahead | None = getattr(before, AHEAD, None)
    if known is None or known.written != before._version or known.columns.shape[1] == length:
        columns = torch.cat([before, to_come(before, COLUMNS)], dim=-1)
        known = Ahead(columns, columns._version)
    after = known.columns[:, : length + 1]
    setattr(after, AHEAD, known)
    return after


APPENDED = {"attention_mask": ones, "position_ids": positions}


def appended(model_kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Of what `generate` keeps for the next token, all that is served here, with the token's column."""
    return {name: one_more(x, to_come) for name, to_come in APPENDED.items() if _is_served(x := model_kwargs.get(name))}


def _is_served(x: Any) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] > 0 and not x.is_inference() and not torch.is_inference_mode_enabled()
