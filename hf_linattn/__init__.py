"""Linear attention for Hugging Face Transformers.

Importing the package registers `attn_implementation="linattn"` for every architecture that uses Transformers' attention interface,
and the Auto classes of converted checkpoints.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from . import models  # noqa: F401
from .attention import linattn_attention
from .cache import LinearStateLayer, StaticLinearStateLayer, install
from .config import NAME, LinAttnConfig
from .dropout import DropoutCallback, DropoutSchedule, set_dropout
from .layers import LinAttnParams
from .mask import linattn_mask
from .ops import empty_state, linear_attention, linear_attention_step
from .support import require_attention_interface

AttentionInterface.register(NAME, linattn_attention)
AttentionMaskInterface.register(NAME, linattn_mask)
install()

__all__ = [
    "DropoutCallback",
    "DropoutSchedule",
    "LinAttnConfig",
    "LinAttnParams",
    "LinearStateLayer",
    "StaticLinearStateLayer",
    "empty_state",
    "linear_attention",
    "linear_attention_step",
    "require_attention_interface",
    "set_dropout",
]
