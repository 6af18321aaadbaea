"""Who sees whom, as linear attention knows it: causality, padding, packed sequences, and the tokens before that a mask hides.

The mask function packs this into one small tensor, which Transformers hands to every layer untouched, moves to the layer's device and
feeds back where it compiles. What must be known without reading values is in its dtype and shape (b, P, 1, W):

dtype    int32: causal; int64: bidirectional; int16: as the module's `is_causal` says
P        1: a row that is 1 at real tokens; 2: also one that is 1 where a sequence begins
W        1: nothing is said, and a bias that the model adds stays as it was; 0: every token is real, those before included; else
         N columns of new tokens, then one with the digest of the tokens before that are hidden, then one more if all N are real
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .counted import SAYS_NOTHING

DTYPES = {True: torch.int32, False: torch.int64, None: torch.int16}
CAUSAL = {dtype: causal for causal, dtype in DTYPES.items()}


@dataclass
class Pattern:
    """What a mask says of N new tokens."""

    causal: bool | None = None  # None: it does not say
    real: Tensor | None = None  # bool (B, N), False at padding; None: all are real
    starts: Tensor | None = None  # bool (B, N), where a packed sequence begins behind another; None: nowhere
    past: Tensor | int | None = None  # (B,) digest of the tokens before that are hidden, -1 where it does not say; 0: of none; None
    whole: bool = False  # positions have nothing to add
    agreed: tuple[Any, ...] | None = None  # which layer compared the past with its state's padding, and which that was


def pack(pattern: Pattern, length: int, device: torch.device | str) -> Tensor:
    """The tensor that says the same of `length` new tokens, (b, P, 1, W)."""
    real, starts, past, dtype = pattern.real, pattern.starts, pattern.past, DTYPES[pattern.causal]
    if real is None and starts is None and not isinstance(past, Tensor):
        return torch.zeros(1, 1, 1, 1 if past is None else 0, dtype=dtype, device=device)
    like = next(x for x in (real, starts, past) if isinstance(x, Tensor))
    rows = torch.ones(like.shape[0], length, device=like.device) if real is None else real
    if starts is not None or length == 1:  # one token cannot begin a sequence: two rows, for W = 1 must not look like nothing
        rows = torch.stack([rows.to(dtype), torch.zeros_like(rows, dtype=dtype) if starts is None else starts.to(dtype)], 1)
    else:
        rows = rows.to(dtype)[:, None]
    said = torch.full_like(rows[..., :1], SAYS_NOTHING)
    if past is not None and dtype != torch.int16:
        said = said * 0 + (past[:, None, None] if isinstance(past, Tensor) else past)
    columns = [rows, said.to(dtype)] if real is not None else [rows, said.to(dtype), torch.zeros_like(rows[..., :1])]
    return torch.cat(columns, -1)[:, :, None]


def is_packed(mask: Tensor | None) -> bool:
    """Whether a mask is one that `pack` made."""
    return mask is not None and mask.dim() == 4 and mask.dtype in CAUSAL and mask.shape[2] == 1


def unpack(mask: Tensor, length: int) -> Pattern:
    """What `pack` put in, for `length` new tokens.

    Raises:
        ValueError: the model has changed the mask on its way.
    """
    causal, planes, width = CAUSAL[mask.dtype], mask.shape[1], mask.shape[3]
    if width < 2 and planes == 1:
        return Pattern(causal, past=None if width else 0)
    if width - length not in (1, 2):
        raise ValueError(
            f"The model made a mask for other tokens than the {length} it attends with, so linear attention cannot tell which of them "
            'are padding; load it with attn_implementation="sdpa".'
        )
    return Pattern(
        causal,
        real=mask[:, 0, 0, :length] > 0 if width == length + 1 else None,
        starts=mask[:, 1, 0, :length] > 0 if planes == 2 and length > 1 else None,
        past=mask[:, 0, 0, length],
    )
