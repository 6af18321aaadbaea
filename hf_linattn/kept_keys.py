"""A cache of keys and values, given to a model with linear attention, is refused where the call makes its masks.

At the first tokens no layer could tell: what such a cache returns are the keys of these tokens, as without a cache. Transformers asks one
function, `masking_utils._preprocess_mask_arguments`, how long a cache is for each mask that it makes; wrapped, it looks at the cache too.
"""

from __future__ import annotations

from typing import Any

from torch.compiler import is_compiling
from transformers import EncoderDecoderCache, PreTrainedConfig, masking_utils
from transformers.cache_utils import Cache

from .cache import MIXED, LinearStateLayer, get_layer_types_and_kwargs
from .calls import KEEPS_KEYS
from .config import NAME

_OF_ONE_MODEL = "transformers.models."
"""Where caches live that a model makes itself, which no other cache would mend: its attention says so, see `calls`."""

_preprocess: Any = masking_utils._preprocess_mask_arguments


def refuse_kept_keys(config: PreTrainedConfig, cache: Cache) -> None:
    """Raises ValueError where layers of a model with `config` are linear, and `cache` was made without it and has a state for none."""
    if any(isinstance(layer, LinearStateLayer) for layer in cache.layers):
        return
    if type(cache).__module__.startswith(_OF_ONE_MODEL) or not {NAME, MIXED} & set(get_layer_types_and_kwargs(config)[0]):
        return
    raise ValueError(f"Linear attention was given a {type(cache).__name__} without states: the cache keeps keys and values. {KEEPS_KEYS}")


def _preprocess_mask_arguments(
    config: Any, inputs_embeds: Any, attention_mask: Any, past_key_values: Any, *args: Any, **others: Any
) -> Any:
    """Transformers' own, of a cache that the model can use.

    Raises:
        ValueError: it cannot.
    """
    is_looked_at = isinstance(past_key_values, Cache) and not isinstance(past_key_values, EncoderDecoderCache)
    if is_looked_at and config._attn_implementation == NAME and not is_compiling():
        refuse_kept_keys(config, past_key_values)
    return _preprocess(config, inputs_embeds, attention_mask, past_key_values, *args, **others)


def install() -> None:
    """Has Transformers' masks made of caches that were looked at."""
    masking_utils._preprocess_mask_arguments = _preprocess_mask_arguments
