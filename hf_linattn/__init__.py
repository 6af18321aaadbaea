"""Linear attention for Hugging Face Transformers.

Importing the package registers `attn_implementation="linattn"` for every architecture that uses Transformers' attention interface,
and the Auto classes of converted checkpoints.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from . import adapters, assisted, cache, choice, deferred, kept_keys, kept_softmax, models, positions  # noqa: F401  (models registers the Auto classes)
from .attention import linattn_attention
from .cache import LinearStateLayer, StaticLinearStateLayer, cache_bytes
from .config import NAME, LinAttnConfig
from .dropout import DropoutCallback, DropoutSchedule, WindowDropCallback, set_dropout, set_window_drop
from .forms import LinAttnParams
from .mask import linattn_mask
from .ops import empty_state, linear_attention, linear_attention_step
from .saved_prompts import load_cache, save_cache
from .support import require_attention_interface
from .training import parameter_groups

__version__ = "0.2.0"

AttentionInterface.register(NAME, linattn_attention)
AttentionMaskInterface.register(NAME, linattn_mask)
cache.install()
kept_softmax.install()
kept_keys.install()
choice.install()
adapters.install()
assisted.install()
deferred.install()
positions.install()

__all__ = [
    "DropoutCallback",
    "DropoutSchedule",
    "LinAttnConfig",
    "LinAttnParams",
    "LinearStateLayer",
    "StaticLinearStateLayer",
    "WindowDropCallback",
    "cache_bytes",
    "empty_state",
    "linear_attention",
    "linear_attention_step",
    "load_cache",
    "parameter_groups",
    "require_attention_interface",
    "save_cache",
    "set_dropout",
    "set_window_drop",
]
