"""The mask function: what a model asks for, read and packed into the small tensor that every linear layer is given.

Linear layers need no (N, N) mask. Transformers says who sees whom by a function of two columns; asking it about neighbours tells
causality and where packed sequences begin, and a padding mask tells which tokens are real, those before included. A window has no
meaning for a running state, and is dropped. A model that keeps softmax layers gets the mask of "sdpa" for all its layers, with the
tensor attached to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers import PreTrainedConfig, masking_utils
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)
from transformers.utils.import_utils import is_tracing

from .config import softmax_layers
from .counted import digest
from .packing import segment_ids
from .pattern import Pattern, pack
from .support import require_attention_interface
from .values import is_traced, require

TOLD = "_linattn_told"
ROWS_AT_ONCE = 1024
WINDOWS = {
    made.__code__ for made in (sliding_window_overlay(1), sliding_window_bidirectional_overlay(1), chunked_overlay(1, torch.zeros(1)))
}
"""What Transformers' windows and chunks run: each call makes a function anew, of the same code."""
SEES_AHEAD = (
    "The model lets some tokens, such as those of an image, see each other ahead in a causal text, which linear attention "
    'cannot; load it with attn_implementation="sdpa", or its text model alone.'
)
OTHER_FUNCTION = (
    "The model's mask function is neither causal nor bidirectional, packed or not, and linear attention knows no other pattern; load it "
    'with attn_implementation="sdpa".'
)

MaskFunction = Callable[..., Any]


def linattn_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    config: PreTrainedConfig,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    q_offset: Any = 0,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What linear layers are told of the new tokens (`pattern.pack`), None for one token and no mask. Softmax layers: the sdpa mask.

    Raises:
        ValueError: an architecture without attention interface; a pattern other than causal or bidirectional, padded, packed or
            windowed; an `attention_mask` that is not 2D or does not reach the last token.
    """
    if not is_tracing(attention_mask):
        require_attention_interface(config)
    softmax_mask = functools.partial(
        masking_utils.sdpa_mask, batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function,
        attention_mask=attention_mask, q_offset=q_offset, device=device, config=config, **kwargs,
    )  # fmt: skip
    if "allow_is_bidirectional_skip" in kwargs and kv_length != q_length and isinstance(q_offset, int) and q_offset == 0:
        return softmax_mask()  # of cross-attention, which is refused where it is ours: a pooling head that computes its own softmax
    if mask_function is causal_mask_function or (q_length == 1 and not kwargs.get("use_vmap", False)):
        pattern = Pattern(True)  # the last token sees all before it
    else:
        pattern = _Asked(mask_function, batch_size, q_length, q_offset, device, kwargs, config).pattern()
    pattern.real, pattern.past = read_padding(attention_mask, q_length, q_offset)
    told = pack(pattern, q_length, device)
    alone = None if q_length == 1 and attention_mask is None and is_traced(told) else told  # a compiled step has no use for it
    if not softmax_layers(config):
        return alone
    mask = softmax_mask()
    if mask is None:
        return alone
    mask = mask.contiguous()  # as generate() asks for: a copy would lose the attribute
    setattr(mask, TOLD, told)
    return mask


def read_padding(mask: Tensor | None, length: int, offset: int | Tensor) -> tuple[Tensor | None, Tensor | int | None]:
    """Which of the new tokens are real, bool (B, length) or None for all, and the digest of the hidden ones before (`Pattern.past`).

    No mask says that all tokens are real, those before too: generate() gives none where it was given ones.

    Raises:
        ValueError: a mask that is not 2D, or has fewer columns than there are tokens.
    """
    if mask is None:
        return None, None if is_tracing(mask) or (isinstance(offset, int) and offset == 0) else 0
    if mask.dim() != 2:
        raise ValueError(f"attention_mask has the shape {tuple(mask.shape)}; linear attention takes a 2D padding mask, or a 4D one.")
    traced = is_tracing(mask)
    mask = mask.to(torch.bool)
    if not traced:
        offset = int(offset)
        if mask.shape[-1] < offset + length:
            raise ValueError(
                f"attention_mask has {mask.shape[-1]} columns, but {offset} tokens were seen before and {length} are new; give one "
                "column for each of them."
            )
        if bool(mask.all()):
            return None, 0 if offset else None
    before: Tensor | None
    if isinstance(offset, int):
        real, before = mask[:, offset : offset + length], digest(~mask[:, :offset]) if offset else None
    else:
        columns = torch.arange(mask.shape[-1], device=mask.device)
        real = mask.index_select(-1, torch.arange(length, device=mask.device) + offset)
        before = digest(~mask & (columns < offset))
    return (None if not traced and bool(real.all()) else real), before


class _Asked:
    """A mask function, asked about pairs of columns."""

    def __init__(
        self, function: MaskFunction, batch: int, length: int, offset: int | Tensor, device: torch.device | str, kwargs: Any, config: Any
    ) -> None:
        self.function, self.length, self.device = function, length, device
        self.custom, self.window = kwargs.get("use_vmap", False), kwargs.get("local_size")
        self.two_sided = "allow_is_bidirectional_skip" in kwargs
        self.skippable = kwargs.get("allow_is_bidirectional_skip" if self.two_sided else "allow_is_causal_skip", False)
        self.chunked = self.window is not None and self.window == getattr(config, "attention_chunk_size", None)
        self.own_window = self.window or getattr(config, "sliding_window", None) or math.inf
        self.offset = offset
        self.batch = torch.arange(batch, device=device)
        self.rows = torch.arange(length, device=device) + offset

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether queries see keys, (n, m) or to be broadcast so; bool (B, n, m)."""
        head = torch.zeros((), dtype=torch.long, device=self.device)
        if not self.custom:
            seen = self.function(self.batch.view(-1, 1, 1, 1), head.view(1, 1, 1, 1), queries[None, None], keys[None, None])
            return seen.expand(len(self.batch), 1, *torch.broadcast_shapes(queries.shape, keys.shape))[:, 0]
        queries, keys = torch.broadcast_tensors(queries, keys)  # users' own functions may not broadcast
        function: Any = torch.vmap(torch.vmap(self.function, (None, None, 0, 0)), (0, None, None, None))
        with TransformGetItemToIndex():
            seen = function(self.batch, head, queries.reshape(-1), keys.reshape(-1))
        return seen.reshape(-1, *queries.shape)

    def pattern(self) -> Pattern:
        """Causality, and where sequences begin.

        Raises:
            ValueError: some tokens see ahead and others do not, or the rest of the pattern does not follow from its neighbours.
        """
        if self.function is bidirectional_mask_function or (self.skippable and self.window is not None):
            return Pattern(not self.two_sided)  # or a window around one of them
        if self.window is not None and (self.window < 2 or self.chunked) and self.length > self.window:
            self.drop_window()
        pattern = self.read_neighbours() if self.length > 1 else Pattern(True)
        if self.custom:
            self.refuse_other_patterns(pattern)
        return pattern

    def drop_window(self) -> None:
        """Takes out of the mask function a window that parts neighbours, and so would be taken for the end of a sequence.

        Raises:
            ValueError: it is not one that Transformers put there.
        """
        function = _without_window(self.function)
        if function is self.function:
            raise ValueError(
                f"Sequences packed together into {self.length} tokens cannot be told from chunks of {self.window} tokens; give "
                'linear attention one sequence a row, padded, or load the model with attn_implementation="sdpa".'
            )
        self.function, self.window = function, None

    def read_neighbours(self) -> Pattern:
        queries, keys = self.rows[None, 1:], self.rows[None, :-1]
        behind, ahead = self.sees(queries, keys)[:, 0], self.sees(keys, queries)[:, 0]
        starts = torch.cat([torch.zeros_like(behind[:, :1]), ~behind], -1)
        if is_tracing(behind):
            require(~ahead.any() | (ahead == behind).all(), SEES_AHEAD)
            return Pattern(None if self.custom else not self.two_sided, starts=starts)
        sees_ahead, is_even, is_packed = torch.stack([ahead.any(), (ahead == behind).all(), starts.any()]).tolist()
        if sees_ahead and not is_even:
            raise ValueError(SEES_AHEAD)
        return Pattern(not sees_ahead, starts=starts if is_packed else None)

    def refuse_other_patterns(self, pattern: Pattern) -> None:
        """Holds a user's own mask function, which may say anything of tokens that are not neighbours, against the whole pattern.

        A window, that of the layer or the model's own put into the function, may hide what it hides: linear attention drops it. While a
        graph is traced the past is left out, for its length is not known.
        """
        traced = is_tracing(self.rows)
        columns = self.rows if traced else torch.arange(int(self.offset) + self.length, device=self.device)
        ids = segment_ids(None, pattern.starts, len(self.batch))
        ids = torch.ones(1, self.length, device=self.device) if ids is None else ids
        all_ids = torch.cat([torch.ones_like(ids[:, :1]).expand(-1, columns.shape[0] - self.length), ids], -1)
        matches = []
        for part, rows in zip(*(x.split(self.length if traced else ROWS_AT_ONCE, -1) for x in (ids, self.rows)), strict=True):
            same, distance = part[:, :, None] == all_ids[:, None], rows[:, None] - columns
            near, seen = distance.abs() < self.own_window, self.sees(rows[:, None], columns)
            causal = same & (distance >= 0)
            matches.append(torch.stack([(seen == wanted).all() for wanted in (causal, causal & near, same, same & near)]))
        wanted = {True: slice(0, 2), False: slice(2, 4), None: slice(0, 4)}[pattern.causal]
        require(torch.stack(matches).all(0)[wanted].any(), OTHER_FUNCTION)


def _without_window(function: MaskFunction) -> MaskFunction:
    """The same function, made anew where it was made of a window or of chunks, which then hide nothing."""
    if function.__code__ in WINDOWS:
        return bidirectional_mask_function
    made_of = [cell.cell_contents for cell in function.__closure__ or ()]
    kept = [_without_windows(part) for part in made_of]
    if all(before is after for before, after in zip(made_of, kept, strict=True)):
        return function
    closure = tuple(map(CellType, kept))
    return FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)


def _without_windows(part: Any) -> Any:
    """What a function was made of, itself where there is no window in it: other functions, tuples of them, anything else."""
    if isinstance(part, tuple):
        kept = tuple(map(_without_windows, part))
        return part if all(before is after for before, after in zip(part, kept, strict=True)) else kept
    return _without_window(part) if isinstance(part, FunctionType) else part
