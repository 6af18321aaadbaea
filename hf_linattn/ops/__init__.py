"""The mathematics: tensors in, tensors out. Nothing here knows of Transformers."""

from .functional import empty_state, linear_attention
from .reference import reference, window_reference
from .step import linear_attention_step
from .window import window_attention

__all__ = ["empty_state", "linear_attention", "linear_attention_step", "reference", "window_attention", "window_reference"]
