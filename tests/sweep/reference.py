"""The same attention from the formula alone: quadratic in the text, under the mask that the model makes for "sdpa".

Nothing of the plugin runs here. `NAME` is an attention implementation of its own, whose mask is Transformers' and whose cache keeps every
key and value; windows and chunks are left out, as linear layers drop them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, cache_utils, masking_utils

NAME = "quadratic_reference"
UNIFORM = "uniform_reference"
"""Weighs every visible key alike: a model that answers the same with it does not feel its attention."""

NAMES = (NAME, UNIFORM)
LOCAL = {"sliding_attention": "full_attention", "chunked_attention": "full_attention", "hybrid_sliding": "hybrid"}
OVERLAYS = ("sliding_window_overlay", "sliding_window_bidirectional_overlay", "chunked_overlay")
calls = 0
"""Attention calls answered so far."""


class NotAMask(ValueError):
    """A float mask holds more than 0 and the minimum, or a bias came beside it."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    slope: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Weights 1 + slope cos(q, k) of the keys that each query sees, normalised."""
    global calls
    calls += 1
    q, k, v = (x.double() for x in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    cosine = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).transpose(-1, -2)
    weights = (1 + slope * cosine) * _visible(module, query, key, attention_mask, is_causal, kwargs)
    out = weights @ v / weights.sum(-1, keepdim=True).clamp_min(1e-12)  # a row that sees nothing gets 0
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _visible(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None, kwargs: dict[str, Any]) -> Tensor:
    """Which key each query sees, as SDPA takes it; broadcasts to (B, H, queries, keys)."""
    if kwargs.get("position_bias") is not None:
        raise NotAMask("A position bias came beside the mask.")
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        visible = torch.ones(queries, keys, dtype=torch.bool)
        return visible.tril() if causal and queries > 1 else visible
    if mask.dtype == torch.bool:
        return mask
    if not ((mask == 0) | (mask <= -1e4)).all():
        raise NotAMask("The float mask is a bias.")
    return mask == 0


def _no_overlay(*args: Any, **kwargs: Any) -> Any:
    return lambda batch, head, query, key: query.new_ones((), dtype=torch.bool)


@contextmanager
def windows_dropped() -> Iterator[None]:
    """While it lasts, Transformers' masks of windows and chunks are those of the whole text."""
    kept = {name: getattr(masking_utils, name) for name in OVERLAYS if hasattr(masking_utils, name)}
    for name in kept:
        setattr(masking_utils, name, _no_overlay)
    try:
        yield
    finally:
        for name, overlay in kept.items():
            setattr(masking_utils, name, overlay)


def sdpa_mask(**kwargs: Any) -> Tensor | None:
    """The mask of "sdpa" in full, never left for the module to guess."""
    whole = {"local_size": None, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return masking_utils.sdpa_mask(**{**kwargs, **whole})


_layer_types = cache_utils.get_layer_types_and_kwargs


def _keep_everything(config: PreTrainedConfig) -> tuple[list[str], Any]:
    types, kwargs = _layer_types(config)
    if config._attn_implementation not in NAMES:
        return types, kwargs
    return [LOCAL.get(kind, kind) for kind in types], kwargs


for _name, _function in ((NAME, attend), (UNIFORM, partial(attend, slope=0.0))):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)
cache_utils.get_layer_types_and_kwargs = _keep_everything
