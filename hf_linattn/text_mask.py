"""What linear layers are told of a new token is what they were told of the token before, as long as `generate` alone adds to a text.

It appends ones to the padding mask: the new token is real, and what the mask hides of those before is what it hid. To read that anew costs
a dozen small kernels a token, and has the host wait for the device three times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from transformers import GenerationMixin

from .config import NAME, softmax_layers

GROWN = "_linattn_grown"
"""Of a padding mask that `generate` appended to: a list shared by all that it was, with what was made of one of them."""


class Made(NamedTuple):
    """The mask of one token, and what it was made for."""

    mask: Any
    cache: Any
    given: tuple[Any, ...]


def hand_on(before: Any, after: Any) -> None:
    """Says of a padding mask that it is the one before and ones."""
    if isinstance(after, Tensor) and after is not before:
        setattr(after, GROWN, getattr(before, GROWN, []))


@functools.cache
def only_appends(model_class: type) -> bool:
    """Whether a model adds to the padding mask as generate() itself does, and not in a way of its own."""
    classes = [kind for kind in model_class.__mro__ if "_update_model_kwargs_for_generation" in kind.__dict__]
    return [kind for kind in classes if kind.__module__ != "hf_linattn.models"] == [GenerationMixin]


def mask_of(make: Callable[..., Any], config: Any, inputs: Tensor, padding: Any, cache: Any, **others: Any) -> Any:
    """`make`'s mask of new tokens, or the one that it made of the token before."""
    grown: list[Made] | None = getattr(padding, GROWN, None)
    text = config.get_text_config()
    is_told = text._attn_implementation == NAME and not softmax_layers(text)
    others_matter = any(value is not None and name != "position_ids" and value is not False for name, value in others.items())
    arguments = {"config": config, "inputs_embeds": inputs, "attention_mask": padding, "past_key_values": cache, **others}
    if grown is None or inputs.shape[1] != 1 or not is_told or others_matter:
        return make(**arguments)
    given = inputs.shape[:2], inputs.device
    if not grown or grown[0].cache is not cache or grown[0].given != given:
        grown[:] = [Made(make(**arguments), cache, given)]
    return grown[0].mask
