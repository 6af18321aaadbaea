"""What a layer reads off the mask it was given, made by our mask function or not."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from .counted import SAYS_NOTHING, digest
from .mask import TOLD, read_padding
from .packing import previous_token, segment_ids
from .pattern import Pattern, is_packed, unpack
from .values import is_traced, remember, require

READ = "_linattn_read"
NEVER_SEEN = -1e4
"""What an additive mask hides: e^-10000 is 0 in every precision."""
OTHER_PATTERN = (
    "The 4D attention mask is neither causal, bidirectional, padded nor packed, and linear attention knows no other pattern; give a 2D "
    "padding mask or position_ids that restart at each sequence."
)
OTHER_PAST = (
    "The attention mask hides other tokens of the past than the ones that were padding when the cache saw them (no mask hides none), and "
    "a state cannot take a token back; give the mask that they came with, or start again from an empty cache."
)
BIAS = (
    "The 4D attention mask holds other numbers than 0 and the least one, a bias on softmax scores, which linear attention has not; "
    'load the model with attn_implementation="sdpa".'
)


def made_pattern(mask: Tensor | None, length: int) -> Pattern | None:
    """What our mask function says of `length` new tokens, None of another one's mask.

    Raises:
        ValueError: the model has changed the mask on its way.
    """
    if mask is None:
        return None
    known: Pattern | None
    if not is_traced(mask) and (known := getattr(mask, READ, None)) is not None:  # by the layer before
        return known
    made = getattr(mask, TOLD, mask)
    if made is None or not is_packed(made):
        return None
    if is_traced(made):
        return unpack(made, length)
    known = getattr(made, READ, None)
    if known is None:
        known = unpack(made, length)
        setattr(made, READ, known)
    return known


def pattern_of(mask: Tensor | None, length: int, offset: int | Tensor, module: nn.Module, causal: bool) -> Pattern:
    """The pattern of `length` new tokens behind `offset` others; `causal` is what the layer is where the mask does not say.

    Raises:
        ValueError: a mask that is neither 2D nor 4D, holds a bias, or another pattern than linear attention knows.
    """
    made = made_pattern(mask, length)
    if made is not None:
        return made if made.causal is not None else dataclasses.replace(made, causal=causal)
    if mask is None:
        return Pattern(causal)
    if not is_tracing(mask):
        offset = int(offset)
    if mask.dim() == 2:
        return remember(mask, "pattern", (length, offset, causal), lambda: _of_2d(mask, length, offset, causal))
    if mask.dim() != 4 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"{type(module).__name__} was given an attention mask of shape {tuple(mask.shape)} and {mask.dtype}; linear attention takes "
            "a 2D padding mask, or a 4D one that is bool or additive."
        )
    window = getattr(module.config, "sliding_window", None)
    return remember(mask, "pattern", (length, offset, causal, window), lambda: _of_4d(mask, length, offset, causal, window))


def _of_2d(mask: Tensor, length: int, offset: int | Tensor, causal: bool) -> Pattern:
    if mask.is_floating_point():
        require((mask >= 0).all(), "A 2D attention mask holds 1 at tokens and 0 at padding; the one given has numbers below 0.")
    if mask.shape[-1] == length:  # of the new tokens alone
        return Pattern(causal, read_padding(mask, length, 0)[0])
    real, past = read_padding(mask, length, offset)
    return Pattern(causal, real, past=past)


def _of_4d(mask: Tensor, length: int, offset: int | Tensor, causal: bool, window: int | None) -> Pattern:
    """Padding, packing and causality, each where the mask shows it; then the whole mask has to follow from them."""
    is_narrow = window is not None and isinstance(offset, int) and length <= mask.shape[-1] < offset + length
    if is_narrow:  # made for a softmax layer whose cache keeps a window of keys only
        offset = mask.shape[-1] - length
    if mask.shape[-2] not in (1, length) or (isinstance(offset, int) and mask.shape[-1] < offset + length):
        raise ValueError(
            f"The 4D attention mask has the shape {tuple(mask.shape)}, but {offset} tokens were seen before and {length} are new; it "
            "needs a row for each new token and a column for each token."
        )
    visible = _visible(mask)
    every = visible[:, 0].expand(-1, length, -1)
    new = every.index_select(-1, torch.arange(length, device=mask.device) + offset)
    real = new.diagonal(0, -2, -1)
    before = previous_token(real)
    starts = real & (before >= 0) & ~new.gather(-1, before.clamp(min=0)[..., None])[..., 0]
    if not is_tracing(mask):
        causal = not bool((new & real[:, :, None] & real[:, None, :]).triu(1).any())

    ids: Any = segment_ids(real, starts, real.shape[0])
    wanted = (ids[:, :, None] == ids[:, None, :]) & real[:, :, None]
    wanted = wanted.tril() if causal else wanted
    given = new & real[:, :, None]  # what padding sees is never read
    past, is_even = _past_of_4d(every, ids, offset)
    follows = (given == wanted).all() & is_even
    if window is not None and window > 1:
        rows = torch.arange(length, device=mask.device)
        distance = (rows[:, None] - rows).abs()
        follows_in_window = (given == wanted & (distance < window if causal else distance <= window)).all()
        far = torch.arange(mask.shape[-1], device=mask.device) <= rows[:, None] + offset - window
        is_windowed = far.any() & ~(every & far).flatten(1).any(-1)  # and then what it hides may be what was counted
        past = torch.where(follows & ~is_windowed, past, SAYS_NOTHING)
        follows = follows | follows_in_window
    require(follows & (visible == visible[:, :1]).all(), OTHER_PATTERN)
    pattern = Pattern(causal, real, starts, None if is_narrow or (isinstance(offset, int) and offset == 0) else past, whole=True)
    if not is_tracing(mask):
        all_real, is_packed = torch.stack([real.all(), starts.any()]).tolist()
        pattern.real, pattern.starts = None if all_real else real, starts if is_packed else None
    return pattern


def _past_of_4d(every: Tensor, ids: Tensor, offset: int | Tensor) -> tuple[Tensor, Tensor]:
    """The digest of the tokens before that are hidden (`Pattern.past`), and whether the rows agree on them.

    `every` is bool (B, N, K), `ids` (B, N) as the operator takes them. Only the first sequence may go on from tokens before.
    """
    before = torch.arange(every.shape[-1], device=every.device) < offset
    goes_on = (ids == 1)[..., None]
    seen = (every & goes_on).any(1)
    is_even = ((every == seen[:, None]) | ~goes_on | ~before).all() & ~(every & (ids > 1)[..., None] & before).any()
    return torch.where(goes_on.any(1)[:, 0], digest(~seen & before), SAYS_NOTHING), is_even


def _visible(mask: Tensor) -> Tensor:
    """True where a 4D mask, bool or additive, lets a query see a key."""
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    require((visible | (mask <= NEVER_SEEN)).all(), BIAS)
    return visible


def refuse_another_past(left_out: Tensor | None, pattern: Pattern, layer: int | None) -> None:
    """Refuses a mask that hides other tokens of the past than the state left out; asked once a forward pass, by the first layer that can,
    and of a mask that is given again no more for the same state.

    `left_out` is the state's digest (B,), None if it left nothing out; `layer` the layer's index.

    Raises:
        ValueError: they differ.
    """
    told, counted = pattern.past, 0 if left_out is None else left_out
    if told is None or (isinstance(told, int) and isinstance(counted, int)):
        return
    if pattern.agreed is not None:
        asked, before, written = pattern.agreed
        if asked != layer or (before is left_out and written is not None and written == _written(left_out)):
            return
    same: Any = (counted == told) | (told == SAYS_NOTHING)
    require(same.all(), OTHER_PAST)
    pattern.agreed = layer, left_out, _written(left_out)


def _written(left_out: Tensor | None) -> int | None:
    """How often, None where nobody counts."""
    if left_out is None:
        return 0
    return None if is_traced(left_out) or left_out.is_inference() else left_out._version
