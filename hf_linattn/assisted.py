"""Assisted decoding, by an assistant, by prompt lookup or by an early exit, where Transformers (5.17 to 5.23) leaves a cache out.

It gives the model the whole text in its first pass, whatever is in the cache already. Softmax attends to those tokens twice, and a state
has them twice, without a word: drafts behind a cache that has seen a part of the text are refused.

And it has the cache record recent tokens, to take wrong drafts back, and hands it on recording: whatever came after would be recorded
too, for nobody. Of caches with a linear layer that ends with the drafts.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import GenerationMixin

from .cache import LinearStateLayer

_assisted_decoding: Any = GenerationMixin._assisted_decoding


@functools.wraps(_assisted_decoding)
def assisted_decoding(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Transformers' own.

    Raises:
        ValueError: the cache has a linear attention layer, and has seen tokens.
    """
    cache: Any = kwargs.get("past_key_values")
    layers = getattr(cache, "layers", ())  # that of an encoder-decoder model holds two others, and has none
    if not any(isinstance(layer, LinearStateLayer) for layer in layers):
        return _assisted_decoding(self, *args, **kwargs)
    if seen := int(cache.get_seq_length()):
        raise ValueError(
            f"Assisted decoding gives the model the whole text again, and past_key_values has seen {seen} tokens of it already; go on from "
            "it without an assistant_model, prompt_lookup_num_tokens and assistant_early_exit, or leave past_key_values out."
        )
    idle = [layer for layer in layers if not getattr(layer, "record_past", False)]
    try:
        return _assisted_decoding(self, *args, **kwargs)
    finally:
        for layer in idle:
            if isinstance(layer, LinearStateLayer):
                layer.stop_past_recording()
            elif hasattr(layer, "record_past"):
                layer.record_past = False


def install() -> None:
    """Wraps the one method."""
    GenerationMixin._assisted_decoding = assisted_decoding  # type: ignore[method-assign]
