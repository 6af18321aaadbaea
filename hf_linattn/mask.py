"""Which tokens are padding, and which belong to the same packed sequence.

Linear layers need no (N, N) mask: the mask function gives them a padding mask (B, N), True at tokens, or None. Packed sequences
are read from what every attention call receives, `position_ids` that restart or `cu_seq_lens_q`. A model that keeps softmax layers
gets the mask of "sdpa" for all its layers, and the padding is read back off it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, masking_utils
from transformers.utils.import_utils import is_tracing

from .config import softmax_layers
from .support import require_attention_interface

PADDING = "_linattn_padding"
STARTS = "_linattn_starts"


def linattn_mask(
    *, q_length: int, config: PreTrainedConfig, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """The padding mask of the new tokens, bool (B, q_length), or None where none is padding. Softmax layers: the sdpa mask.

    Raises:
        ValueError: an architecture without attention interface, or a mask that lets some tokens see ahead.
    """
    if not is_tracing(attention_mask):
        require_attention_interface(config)
        _refuse_overlays(q_length, **kwargs)
    padding = _last_tokens(attention_mask, q_length)
    if not softmax_layers(config):
        return padding
    mask = masking_utils.sdpa_mask(q_length=q_length, attention_mask=attention_mask, **kwargs)
    if mask is not None:
        setattr(mask, PADDING, padding)
    return mask


def _refuse_overlays(
    length: int, mask_function: Callable[..., Tensor], batch_size: int, q_offset: int | Tensor, device: torch.device,
    use_vmap: bool = False, **kwargs: Any,
) -> None:  # fmt: skip
    """A model may let the tokens of an image see each other inside a causal text; a running state cannot."""
    if length < 2 or not (use_vmap or "or_masks" in getattr(mask_function, "__qualname__", "")):
        return
    rows = torch.arange(length - 1, device=device) + q_offset
    batch = torch.arange(batch_size, device=device)[:, None]
    ahead = mask_function(batch, torch.zeros_like(batch), rows[None], rows[None] + 1)
    if bool(ahead.any()) and not bool(ahead.all()):
        raise ValueError(
            "The model lets some tokens, such as those of an image, see each other ahead in a causal text, which linear attention "
            'cannot; load it with attn_implementation="sdpa", or its text model alone.'
        )


def _last_tokens(mask: Tensor | None, length: int) -> Tensor | None:
    """The last `length` columns of a 2D mask; idempotent, for generate's compiled decoding feeds its own result back."""
    if mask is None or length == 1:  # a decoded token is never padding
        return None
    mask = mask[:, -length:].to(torch.bool)
    if not is_tracing(mask) and bool(mask.all()):
        return None
    return mask


def padding_of(mask: Tensor | None, length: int) -> Tensor | None:
    """The padding mask (B, length) behind whatever mask a layer was given: None, 2D, or 4D as for sdpa or eager."""
    if mask is None or length == 1:
        return None
    if mask.dim() == 2:  # the same object for every layer, if it can be
        return mask if mask.dtype == torch.bool and mask.shape[-1] == length else mask[:, -length:].to(torch.bool)
    if hasattr(mask, PADDING):
        return getattr(mask, PADDING)
    return _last_tokens(_visible(mask)[:, 0].diagonal(mask.shape[-1] - length, -2, -1), length)


def _visible(mask: Tensor) -> Tensor:
    """True where a 4D mask, bool or additive, lets a query see a key."""
    return mask if mask.dtype == torch.bool else mask == 0


def refuse_other_patterns(mask: Tensor | None, segments: Tensor | None, causal: bool) -> None:
    """Linear attention knows padding, packing and causality; refuses a 4D mask that says anything else.

    Raises:
        ValueError: the mask is no such pattern.
    """
    if mask is None or mask.dim() != 4 or is_tracing(mask):
        return
    length = mask.shape[-2]
    runs = torch.ones(1, length, device=mask.device) if segments is None else segments.to(torch.int32)
    real = runs > 0
    wanted = (runs[:, :, None] == runs[:, None, :]) & real[:, :, None]
    wanted = wanted.tril() if causal else wanted
    given = _visible(mask)[..., -length:] & real[:, None, :, None]  # what padding sees is never read
    if not bool((given == wanted[:, None]).all()):
        raise ValueError(
            "The 4D attention mask is neither causal, padded nor packed, and linear attention knows no other pattern; give a 2D "
            "padding mask or position_ids that restart at each sequence."
        )


def sequence_starts(padding: Tensor | None, position_ids: Tensor | None, cu_seq_lens: Tensor | None, length: int) -> Tensor | None:
    """Where a packed sequence begins behind another, bool (B or 1, length); None where nothing is packed.

    Positions jump at padding inside a text, so that beside a padding mask only position 0 begins a sequence.
    """
    if length == 1:
        return None
    if cu_seq_lens is not None:
        return _once_a_forward(cu_seq_lens, None, lambda: _starts_from_bounds(cu_seq_lens, length))
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[-1] != length:
        return None
    return _once_a_forward(position_ids, padding, lambda: _starts_from_positions(position_ids, padding))


def _starts_from_bounds(bounds: Tensor, length: int) -> Tensor:
    starts = torch.zeros(length + 1, dtype=torch.bool, device=bounds.device)
    starts = starts.index_fill(0, bounds.long(), True)
    return torch.cat([torch.zeros_like(starts[:1]), starts[1:length]])[None]


def _starts_from_positions(positions: Tensor, padding: Tensor | None) -> Tensor:
    if padding is not None:
        return (positions == 0) & padding & (padding.cumsum(-1) > 1)
    jumps = positions[:, 1:] - positions[:, :-1] != 1
    return torch.cat([torch.zeros_like(jumps[:, :1]), jumps], -1)


def _once_a_forward(source: Tensor, padding: Tensor | None, starts_of: Callable[[], Tensor]) -> Tensor | None:
    """`starts_of()`, None if there are none; kept on `source` for the next layer, since asking a GPU in each would stall it."""
    if is_tracing(source):
        return starts_of()
    written = None if source.is_inference() else source._version
    known = getattr(source, STARTS, None)
    if known is not None and written is not None and known[0] == written and known[1] is padding:
        return known[2]
    starts = starts_of()
    found = starts if bool(starts.any()) else None
    setattr(source, STARTS, (written, padding, found))
    return found


def segment_ids(padding: Tensor | None, starts: Tensor | None, batch: int) -> Tensor | None:
    """What `linear_attention` takes: None, the padding mask (B, N), or int32 (B, N), 0 at padding and n in the n-th sequence."""
    if starts is None:
        return padding
    ids = (1 + starts.cumsum(-1, dtype=torch.int32)).expand(batch, -1)
    return ids if padding is None else ids * padding
