"""The mathematics: tensors in, tensors out. Nothing here knows of Transformers."""

from .functional import empty_state, linear_attention, linear_attention_step
from .reference import reference, window_reference
from .window import window_attention

__all__ = ["empty_state", "linear_attention", "linear_attention_step", "reference", "window_attention", "window_reference"]
