"""Calls whose meaning linear attention would silently change are refused in one sentence; what it drops is said once."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from transformers import Cache
from transformers.utils import logging

from .architectures import has_cross_attention
from .config import LinAttnConfig
from .values import attribute

logger = logging.get_logger(__name__)

CROSSES = "_linattn_crosses"
"""Of an attention module: its config, and whether it is cross-attention by it."""
TOLD_DROPPED = "_linattn_told_dropped"
"""Of an attention module: what is dropped of its softmax has been said."""
WINDOWED = ("sliding_attention", "chunked_attention")
KEEPS_KEYS = (
    "Make it from the model's config, DynamicCache(config=model.config), after the model got "
    'attn_implementation="linattn", and leave quantized caches out. Prefix tuning of PEFT fills such a cache with learned keys, '
    "and linear attention has no place for them: train with LoRA or prompt tuning instead."
)
"""What to do about a cache of keys and values."""
KEYS_FOR_STATE = "The cache was made for another model: it keeps keys and values where a layer of this one is linear."
STATE_FOR_KEYS = (
    "The cache was made for another model: it keeps a state where a layer of this one is softmax (linattn option softmax_layers). "
    "Make it from the model's config, DynamicCache(config=model.config)."
)
OTHER_STATES = {"encoder_hidden_states", "encoder_states", "key_value_states", "cross_attention_states", "context", "key", "value"}


def refuse_unknown_calls(module: nn.Module, queries: int, keys: int, kwargs: dict[str, Any]) -> None:
    """Refuses what linear attention is not: it attends from new tokens to themselves and to a state of those before.

    Raises:
        ValueError: cross-attention, a relative position bias, or a cache of keys and values.
    """
    name = type(module).__name__
    if _is_cross_attention(module) or (keys != queries and not getattr(module, "is_causal", True)):
        raise ValueError(
            f"{name} is cross-attention, from {queries} tokens to {keys} others, which linear attention does not serve; "
            'load the model with attn_implementation="sdpa".'
        )
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{name} adds a position bias to softmax scores, which linear attention has not; "
            'load the model with attn_implementation="sdpa".'
        )
    if keys != queries:
        own = _cache_of_its_own(type(module).__module__)
        if own is not None:
            raise ValueError(
                f"{name} belongs to a model that makes a cache of its own, {own}, which keeps keys and values and not the state of linear "
                'attention; give use_cache=False, or load the model with attn_implementation="sdpa".'
            )
        raise ValueError(f"Linear attention was given {keys} keys for {queries} queries: the cache keeps keys and values. {KEEPS_KEYS}")


def _is_cross_attention(module: nn.Module) -> bool:
    config = getattr(module, "config", None)  # a module that is no part of Transformers may have none
    if is_compiling():
        return _crosses(module, config)
    known = module.__dict__.get(CROSSES)
    if known is None or known[0] is not config:
        known = module.__dict__[CROSSES] = config, _crosses(module, config)
    return bool(known[1])


def _crosses(module: nn.Module, config: Any) -> bool:
    if config is not None and has_cross_attention(config):
        return True  # one class may serve for both
    return attribute(module, "is_cross_attention", False) or _takes_other_states(type(module))


@torch.compiler.assume_constant_result
def _takes_other_states(module_class: Any) -> bool:
    """Whether a class attends to something else than its own hidden states: it says so by its name, or cannot be called without."""
    return "CrossAttention" in module_class.__name__ or bool(_required_arguments(module_class) & OTHER_STATES)


@functools.cache
def _cache_of_its_own(source: str) -> str | None:
    """The name of the class of caches that a source file of models has, where it has one."""
    kinds = [value for value in vars(sys.modules[source]).values() if isinstance(value, type) and issubclass(value, Cache)]
    return next((kind.__name__ for kind in kinds if kind.__module__ == source), None)


@functools.cache
def _required_arguments(module_class: Any) -> set[str]:
    parameters = inspect.signature(module_class.forward).parameters.values()
    return {parameter.name for parameter in parameters if parameter.default is parameter.empty}


def _has_windows(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether softmax would not see all tokens in this layer, or in another one that is linear: all layers then say the same."""
    window = kwargs.get("sliding_window")
    if isinstance(window, int) and window > 0:
        return True
    config: Any = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if not isinstance(types, (list, tuple)):
        return False
    kept = LinAttnConfig.of(config).softmax_layers
    return any(kind in WINDOWED and layer not in kept for layer, kind in enumerate(types))


def warn_about_dropped(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Says once what of the softmax model there is not: sliding windows, softcaps, sinks, attention weights."""
    if is_compiling():
        return
    if TOLD_DROPPED not in module.__dict__:
        module.__dict__[TOLD_DROPPED] = True
        there = {
            "sliding windows": _has_windows(module, kwargs),
            "softcaps": kwargs.get("softcap") is not None,
            "attention sinks": kwargs.get("s_aux") is not None,
        }
        if dropped := [what for what, is_there in there.items() if is_there]:
            said = f"{type(module).__name__}: {' and '.join(dropped)} shape softmax scores; linear attention drops them."
            logger.warning_once(said)
    if kwargs.get("output_attentions"):
        name = type(module).__name__
        logger.warning_once(f"{name}: linear attention computes no attention weights, so output_attentions=True returns none.")
