"""A cache of keys and values, given to a model with linear attention, is refused where the call makes its masks.

At the first tokens no layer could tell: what such a cache returns are the keys of these tokens, as without a cache. Transformers asks one
function, `masking_utils._preprocess_mask_arguments`, how long a cache is for each mask that it makes; wrapped, it looks at the cache too.
A model that makes no mask, and one inside a graph of torch.compile, have nobody who looks: their first call is right all the same, and
the layers refuse the second one, see `calls`.
"""

from __future__ import annotations

from typing import Any

from torch.compiler import is_compiling
from transformers import EncoderDecoderCache, PreTrainedConfig, masking_utils
from transformers.cache_utils import Cache

from .cache import MIXED, LinearStateLayer, get_layer_types_and_kwargs
from .calls import KEEPS_KEYS, KEYS_FOR_STATE, STATE_FOR_KEYS
from .config import NAME

_OF_ONE_MODEL = "transformers.models."
"""Where caches live that a model makes itself, which no other cache would mend: its attention says so, see `calls`."""

_preprocess: Any = masking_utils._preprocess_mask_arguments


def refuse_kept_keys(config: PreTrainedConfig, cache: Cache) -> None:
    """Raises ValueError where layers of a model with `config` are linear, and `cache` was made without it and has a state for none, or was
    made for a model others of whose layers are; of a cache that has seen tokens only the former is asked."""
    has_state = [isinstance(layer, LinearStateLayer) for layer in cache.layers]
    if (any(has_state) and cache.is_initialized) or type(cache).__module__.startswith(_OF_ONE_MODEL):
        return
    is_linear = [kind in (NAME, MIXED) for kind in get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0]]
    if cache.layers:  # of a model that drafts by its first layers, those alone
        is_linear = is_linear[: len(cache.layers)]
    if any(is_linear) and not any(has_state):
        name = type(cache).__name__
        raise ValueError(f"Linear attention was given a {name} without states: the cache keeps keys and values. {KEEPS_KEYS}")
    other = next((layer for layer, (kept, linear) in enumerate(zip(has_state, is_linear, strict=False)) if kept != linear), None)
    if other is not None:
        raise ValueError(STATE_FOR_KEYS if has_state[other] else f"{KEYS_FOR_STATE} {KEEPS_KEYS}")


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
