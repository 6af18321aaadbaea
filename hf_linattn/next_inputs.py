"""What `generate` gives a model of a new token, made as that of the token before: two small tensors are new, and all else is the same.

Transformers goes through its configuration, parameters and arguments for it at each token, and a GPU waits for that longer than for all
else between two steps. So it is asked at a text's first tokens. Once it has given the same of two of them, the token and its position
apart, those that follow are given that, for as long as the mask, the configuration and all arguments stay what they were.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationMixin

from . import text_mask
from .compiled import only_reads

METHOD = "prepare_inputs_for_generation"
_CUT, _CACHE = ("input_ids", "position_ids"), "past_key_values"
_SIMPLE = (bool, int, float, str, type(None))


class Before(NamedTuple):
    """What the token before was given, and of which arguments that was made; without the cache, by which it is kept."""

    arguments: dict[str, Any]
    result: dict[str, Any]  # in its order; None in the place of what is new with each token, and of the cache
    is_proven: bool
    is_only_read: bool  # whether nobody writes into what a model is given

    def fits(self, new: dict[str, Any], arguments: dict[str, Any]) -> bool:
        return _same(self.arguments, arguments) and all(isinstance(new[name], Tensor) for name in _CUT if name in self.result)

    def go_on(self, new: dict[str, Any], cache: Any) -> dict[str, Any]:
        made = self.result | {_CACHE: cache}
        return made | {name: _last(new[name], self.is_only_read) for name in _CUT if name in made}


@functools.wraps(GenerationMixin.prepare_inputs_for_generation)
def prepare_inputs_for_generation(model: Any, input_ids: Any, next_sequence_length: int | None = None, past_key_values: Any = None,
                                  attention_mask: Any = None, *more: Any, **others: Any) -> dict[str, Any]:  # fmt: skip
    """Transformers' inputs of the newest token, or those of the token before with what is new."""
    if more:
        first = next_sequence_length, past_key_values, attention_mask
        return GenerationMixin.prepare_inputs_for_generation(model, input_ids, *first, *more, **others)  # type: ignore[no-any-return]
    given = {"next_sequence_length": next_sequence_length, "past_key_values": past_key_values, "attention_mask": attention_mask}
    make = functools.partial(GenerationMixin.prepare_inputs_for_generation, model, input_ids, **given)
    is_next = next_sequence_length == 1 and not others.get("is_first_iteration") and input_ids.dim() == 2
    if not is_next or past_key_values is None or others.get("inputs_embeds") is not None:
        return make(**others)  # type: ignore[no-any-return]
    new = {"input_ids": input_ids, "position_ids": others.get("position_ids")}
    same = {name: value for name, value in others.items() if name not in new}
    if (made := text_mask.made_for(attention_mask, past_key_values)) is not None and made.before:
        before: Before = made.before[0]
        if before.is_proven and before.fits(new, same) and made.given == (input_ids.shape[0], input_ids.device) and made.is_told():
            return before.go_on(new, past_key_values)
    result: dict[str, Any] = make(**others)
    if (made := text_mask.made_for(attention_mask, past_key_values)) is not None:
        made.before[:] = [_learned(model, made.before[0] if made.before else None, same, result, new, past_key_values)]
    return result


def _learned(model: Any, before: Before | None, arguments: dict[str, Any], result: dict[str, Any], new: dict[str, Any],
             cache: Any) -> Before:  # fmt: skip
    same = {name: None if name in (*_CUT, _CACHE) else value for name, value in result.items()}
    proven = before is not None and _same(before.arguments, arguments) and _same(before.result, same) and list(before.result) == list(same)
    proven = proven and result.get(_CACHE) is cache and all(_is_cut(result[name], new[name]) for name in _CUT if name in result)
    return Before(arguments, same, proven, proven and only_reads(model))


def _last(x: Tensor, is_only_read: bool) -> Tensor:
    """The last column, with the strides of one that was copied. That of one row is no copy, which would be another kernel, where nobody
    writes into it: the text would be written."""
    if is_only_read and x.shape[0] == 1:
        return x.as_strided((1, 1), (1, 1), x.storage_offset() + (x.shape[1] - 1) * x.stride(1))
    return x[:, -1:].clone(memory_format=torch.contiguous_format)


def _is_cut(one: Any, all_of_them: Any) -> bool:
    """Whether it is the last column, where that is."""
    if not isinstance(one, Tensor) or not isinstance(all_of_them, Tensor) or one.dim() != 2 or all_of_them.dim() != 2:
        return False
    last = all_of_them[:, -1:]
    return one.device == last.device and one.dtype == last.dtype and torch.equal(one, last)


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    if before.keys() != now.keys():
        return False
    pairs = ((before[name], x) for name, x in now.items())
    return all(a is b or (type(a) is type(b) and isinstance(b, _SIMPLE) and a == b) for a, b in pairs)
