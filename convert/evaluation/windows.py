"""The control that costs nothing: the teacher's own softmax, seeing only its last W tokens and the first S ones, with no training.

An attention function beside Transformers' SDPA, through which a layer is put under such a window without another model being made.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from convert.errors import ConversionError
from hf_linattn.config import sliding_windows
from hf_linattn.models import attention_modules

NAME = "window_and_sinks"


def window_mask(queries: int, keys: int, window: int, sinks: int, device: Any = None) -> Tensor:
    """Who sees whom: bool (queries, keys), where the queries are the last of so many tokens.

    Args:
        window: how many tokens back, itself included.
        sinks: how many of the first tokens besides.
    """
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    return (key <= query) & ((query - key < window) | (key < sinks))


def windowed(model: Any, window: int, sinks: int, layers: Collection[int] | None = None) -> Any:
    """A copy of ``model``, sharing its weights, with its layers, or some of them, under a window. It must not be shown padding.

    Raises:
        ConversionError: the model's attention is not softmax over all tokens, or is capped.
    """
    _require_plain(model)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    copied.set_attn_implementation(NAME)
    put_under_window(copied, window, sinks, layers)
    return copied


def put_under_window(copied: Any, window: int, sinks: int, layers: Collection[int] | None = None) -> None:
    """Puts these layers of what `windowed` gave under a window, and no others; None: all."""
    for _, module in attention_modules(copied):
        module.window_and_sinks = (window, sinks) if layers is None or module.layer_idx in layers else None


def _require_plain(model: Any) -> None:
    config = model.config.get_text_config(decoder=True)
    linear = getattr(config, "linattn", None) is not None
    own = any(window is not None for window in sliding_windows(config))
    if linear or own or getattr(config, "attn_logit_softcapping", None) or not model._supports_sdpa:
        raise ConversionError(
            f"a window with sinks is put on softmax attention over all tokens, through SDPA, and {type(model).__name__} has another; "
            "leave the windows out"
        )


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """As the interface calls it: query (B, H, Nq, D), key and value (B, Hk, N, D), mask bool or None."""
    asked = getattr(module, "window_and_sinks", None)
    if asked is not None:
        window, sinks = asked
        seen = window_mask(query.shape[2], key.shape[2], window, sinks, query.device)[None, None]
        attention_mask = seen if attention_mask is None else attention_mask & seen
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
