"""What linear layers are told of a new token is what they were told of the token before, as long as `generate` alone adds to a text.

It appends ones to the padding mask: the new token is real, and what the mask hides of those before is what it hid. To read that anew costs
a dozen small kernels a token, and has the host wait for the device three times. Where there is no mask every token is real, and asking
Transformers for one that says so takes longer than all else of ours that a compiled token has the host do. What is written into a mask
between two tokens is seen where PyTorch counts it, which it does not of `mask.data` and numpy's view.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import GenerationMixin

from .config import NAME, softmax_layers

GROWN = "_linattn_grown"
"""Of a padding mask that `generate` appended to: what is known of it, as `Grown`."""

_without_padding: WeakKeyDictionary[Any, list[Made]] = WeakKeyDictionary()
"""By cache, what was made of a token where no mask was given: newer Transformers leave out one of ones."""


class Made(NamedTuple):
    """The mask of one token, and what it was made for."""

    mask: Any
    cache: Any
    config: Any
    text_config: Any
    given: tuple[Any, ...]
    before: list[Any]  # what else was made of a token with this mask, see `next_inputs`

    def is_told(self) -> bool:
        """Whether every layer is linear, and so is told of a token what our mask function packs."""
        return self.text_config._attn_implementation == NAME and not softmax_layers(self.text_config)


class Grown(NamedTuple):
    """A list shared by all that a padding mask was, with what was made of one of them, and how often this one had been written then."""

    made: list[Made]
    written: int


def hand_on(before: Any, after: Any) -> None:
    """Says of a padding mask that it is the one before and ones."""
    if isinstance(after, Tensor) and after is not before and not after.is_inference():  # whose writes are not counted
        made = _made(before)
        setattr(after, GROWN, Grown([] if made is None else made, after._version))


def _made(padding: Any) -> list[Made] | None:
    """What was made of what a padding mask was; None where nobody appended to it, or someone, a loop of the user's, wrote into it since."""
    grown: Grown | None = getattr(padding, GROWN, None)
    return None if grown is None or grown.written != padding._version else grown.made


@functools.cache
def only_appends(model_class: type) -> bool:
    """Whether a model adds to the padding mask as generate() itself does, and not in a way of its own."""
    classes = [kind for kind in model_class.__mro__ if "_update_model_kwargs_for_generation" in kind.__dict__]
    return [kind for kind in classes if kind.__module__ != "hf_linattn.models"] == [GenerationMixin]


def made_for(padding: Any, cache: Any) -> Made | None:
    """What was made of a token of this cache, where it holds for the next one."""
    made = _made(padding) if padding is not None else _without_padding.get(cache)
    return made[0] if made and made[0].cache is (None if padding is None else cache) else None


def mask_of(make: Callable[..., Any], config: Any, inputs: Tensor, padding: Any, cache: Any, **others: Any) -> Any:
    """`make`'s mask of new tokens, or the one that it made of the token before."""
    made = _made(padding) if padding is not None else None if cache is None else _without_padding.setdefault(cache, [])
    others_matter = any(value is not None and name != "position_ids" and value is not False for name, value in others.items())
    arguments = {"config": config, "inputs_embeds": inputs, "attention_mask": padding, "past_key_values": cache, **others}
    if made is None or inputs.shape[1] != 1 or others_matter:
        return make(**arguments)
    given = inputs.shape[0], inputs.device
    before = made_for(padding, cache)
    if before is not None and before.config is config and before.given == given and before.is_told():
        return before.mask
    # the cache would live as long as what is kept by it
    now = Made(make(**arguments), None if padding is None else cache, config, config.get_text_config(), given, [])
    if cache is not None and now.is_told() and _is_of_this_token(padding, cache.get_seq_length()):
        made[:] = [now]
    return now.mask


def _is_of_this_token(padding: Any, before: Any) -> bool:
    """Whether a mask says of all tokens `before` and of one more, and nothing else."""
    if padding is None:
        return isinstance(before, Tensor) or before > 0  # of a cache that has seen none it says nothing of those before
    return bool(padding.shape[-1] == before + 1)
