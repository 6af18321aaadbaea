"""A causal model that is given a 2D mask and no positions counts real tokens, as `generate` has every model do.

Transformers counts columns, padding or not. Softmax over rotary positions does not mind that, for scores see distances alone. Learned
features of rotated queries and keys see positions, as tables of positions do, and a text behind padding would get another answer.

A loop of the user's that asks Transformers for a model's inputs is given another mask for a static cache, which tells nothing of positions;
so these are made there as well.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from .architectures import names_in
from .config import NAME

COUNTS = "_linattn_counts_tokens"
"""Of a forward method that does already."""
GIVEN = {"attention_mask", "position_ids", "past_key_values"}
MADE_OF = {"arange", "get_seq_length"}
LOOKED_UP = {"rotary_emb", "pos_emb", "wpe", "embed_positions"}
"""What a forward method calls that makes its positions of columns and looks them up itself, by a row or by those of a batch. Others hand
them on, to layers that have none, or to which 0 says that a text begins (RecurrentGemma)."""
FIRST = "next_sequence_length", "past_key_values", "attention_mask"

_prepare = GenerationMixin.prepare_inputs_for_generation


def count_real_tokens(model: nn.Module) -> None:
    """Wraps the forward methods of the classes, among those of a model and its parts, that make positions for linear attention.

    It is the class's method that is wrapped: PEFT calls it past `__call__` and its hooks. Other implementations are not touched.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == NAME:
            for kind in type(module).__mro__:
                forward: Any = vars(kind).get("forward")
                if forward is not None and not hasattr(forward, COUNTS) and _makes_positions(forward):
                    setattr(kind, "forward", _counting(forward))  # noqa: B010


def _makes_positions(forward: Callable[..., Any]) -> bool:
    names = set(names_in(inspect.unwrap(forward).__code__))
    return set(inspect.signature(forward).parameters) >= GIVEN and names >= MADE_OF and bool(names & LOOKED_UP)


def _counting(forward: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation == NAME:
            given = dict(zip(names, args, strict=False)) | kwargs
            positions = _positions(**given) if given.get("position_ids") is None else None
            if positions is not None:
                return forward(self, **given | {"position_ids": positions})
        return forward(self, *args, **kwargs)

    setattr(counting, COUNTS, True)
    return counting


def _positions(
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    **others: Any,
) -> Tensor | None:
    """Of the new tokens, int64 (B, N), how many real ones stand before each; None without a 2D mask. A static cache's mask may be longer
    than the text, and one too short is left to the mask function to refuse."""
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    if inputs is None or not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    before = 0 if past_key_values is None else past_key_values.get_seq_length()
    every = (attention_mask.to(inputs.device, torch.bool).cumsum(-1) - 1).clamp(min=0)
    columns = torch.arange(inputs.shape[1], device=inputs.device) + before
    return every.index_select(-1, columns.clamp(max=every.shape[-1] - 1))


@functools.wraps(_prepare)
def prepare_inputs_for_generation(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Transformers' own, with positions where it took the place of a 2D mask by another."""
    inputs: dict[str, Any] = _prepare(self, input_ids, *args, **kwargs)
    mask = (dict(zip(FIRST, args, strict=False)) | kwargs).get("attention_mask")
    if mask is not None and inputs.get("attention_mask") is not mask and inputs.get("position_ids") is None and _counts(self):
        positions = _positions(**inputs | {"attention_mask": mask})
        inputs |= {} if positions is None else {"position_ids": positions}
    return inputs


def _counts(model: Any) -> bool:
    """Whether the base of a language model counts real tokens, and is handed positions by it."""
    inner = getattr(model, "base_model", None)
    counts = isinstance(inner, PreTrainedModel) and inner.config._attn_implementation == NAME and hasattr(type(inner).forward, COUNTS)
    return counts and "position_ids" in inspect.signature(model.forward).parameters


def install() -> None:
    """Wraps what Transformers gives a model of the next tokens."""
    GenerationMixin.prepare_inputs_for_generation = prepare_inputs_for_generation  # type: ignore[method-assign]
