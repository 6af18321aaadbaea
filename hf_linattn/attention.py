"""The attention function that Transformers calls in every attention module of a model with `attn_implementation="linattn"`."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_torchdynamo_compiling

from .architectures import missing_parameters
from .cache import LinearStateLayer, take
from .calls import refuse_unknown_calls, warn_about_dropped
from .config import NAME, LinAttnConfig
from .ops import linear_attention, linear_attention_step
from .packing import segment_ids, sequence_starts
from .pattern import Pattern, is_packed
from .rollback import Recurrence
from .told import made_pattern, pattern_of, refuse_another_past
from .values import require

Number = float | Tensor
SDPA_HAS_NOT = ("softcap", "s_aux", "sinks")  # what shapes softmax scores and PyTorch's SDPA has no argument for
PACKED_IN_A_CACHE = (
    "Positions fall, so sequences are packed together, and the softmax layers of this model cannot tell them apart in a cache that is "
    "longer than these tokens; give packed sequences use_cache=False."
)
FASTEST, SLOWEST = 1.5, 512.0  # tokens: the time constants of the first and of the last head


def linattn_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float | Tensor = 0.0,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Linear attention of one layer, or softmax where `softmax_layers` keeps it.

    query (B, Hq, N, D), key and value (B, Hk, N, D) as Transformers gives them, rotary embedding applied; the result is
    (B, N, Hq, Dv), contiguous, in the query's dtype, and None, for there are no attention weights to return. A sliding window,
    a softcap and attention sinks shape softmax scores and have no meaning here: they are dropped.

    Raises:
        ValueError: cross-attention, a cache of keys and values, a mask or bias that linear attention cannot honour, or options
            of `config.linattn` out of bounds.
        TypeError: options of the wrong type.
    """
    key, value, layer = take(query, key, value)
    options = options_of(module)
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    length = query.shape[2]
    if keeps_softmax(module, options):
        made = made_pattern(attention_mask, length)
        starts = None if made is None else sequence_starts(made.real, position_ids, cu_seq_lens_q, length)
        if made is not None and is_packed(attention_mask):
            is_causal, attention_mask = is_causal if made.causal is None else made.causal, None
        return softmax_attention(module, query, key, value, attention_mask, starts, scaling, dropout, is_causal, kwargs)
    refuse_unknown_calls(module, query, key, kwargs)
    warn_about_dropped(module, kwargs)
    first = layer is None or layer.is_first(length)
    pattern = pattern_of(attention_mask, length, 0 if layer is None else layer.seen_before(length), module, is_causal)
    causal = bool(pattern.causal) or (length == 1 and not first)  # the last token sees all of them either way
    if layer is not None and not first and (layer.is_incomplete or not causal):
        raise ValueError("A cache holds what came before; bidirectional linear attention cannot go on from it. Give use_cache=False.")
    if layer is not None and not first:
        refuse_another_past(layer.left_out, pattern)

    segments = segments_of(pattern, position_ids, cu_seq_lens_q, length, query.shape[0])
    numbers = coefficients(module, options, query, scaling)
    chance = noise(module, options, dropout)
    has_state = layer is not None and (causal or ("log_decay" not in numbers and not _is_packed(segments)))
    if layer is not None and not has_state:
        layer.is_incomplete = True
    if layer is None or not has_state:
        out: Any = linear_attention(query, key, value, causal=causal, segment_ids=segments, **numbers, **chance)
    else:
        out = attend_with_state(layer, first, causal, query, key, value, segments, numbers, chance)
        if pattern.real is not None:
            layer.leave_out(~pattern.real.expand(query.shape[0], -1))
    return out.transpose(1, 2).contiguous(), None


def segments_of(pattern: Pattern, position_ids: Tensor | None, cu_seq_lens: Tensor | None, length: int, batch: int) -> Tensor | None:
    """What the operator is given: padding, and where sequences begin by the mask, by `cu_seq_lens` or by falling positions."""
    starts = pattern.starts
    if not pattern.whole:
        told = sequence_starts(pattern.real, position_ids, cu_seq_lens, length)
        starts = told if starts is None else starts if told is None else starts | told
    return segment_ids(pattern.real, starts, batch)


def attend_with_state(
    layer: LinearStateLayer,
    first: bool,
    causal: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor | None,
    numbers: dict[str, Any],
    noise: dict[str, Any],
) -> Tensor:
    """Attention over the state and the new tokens; leaves the state after them in `layer`."""
    log_decay = numbers.get("log_decay")
    recurrence = Recurrence(query.shape[1], not _is_zero(numbers["c"]), numbers["normalize_qk"], log_decay)
    heads = key.shape[1] if log_decay is None else log_decay.shape[0]
    before = None if first else layer.allocate(key, value, heads, recurrence.quadratic)
    if _is_packed(segments):
        layer.forget_recent()
    else:
        layer.record(recurrence, key, value, segments, before)
    if before is not None and query.shape[2] == 1 and not noise and not _needs_grad(query, key, value):
        return linear_attention_step(query, key, value, before, segment_ids=segments, **numbers)
    out, after = linear_attention(
        query, key, value, causal=causal, segment_ids=segments, initial_state=before, return_state=True, **numbers, **noise
    )
    layer.write(after)
    return out


def _is_packed(segments: Tensor | None) -> bool:
    return segments is not None and segments.dtype != torch.bool


def _is_zero(c: Number) -> bool:
    return not isinstance(c, Tensor) and c == 0


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def options_of(module: nn.Module) -> LinAttnConfig:
    """`LinAttnConfig.of(module.config)`, checked once per content of `config.linattn`, not once a token."""
    config: Any = module.config
    if is_torchdynamo_compiling():
        return LinAttnConfig.of(config)
    stored = getattr(config, NAME, None)
    cached = module.__dict__.get("_linattn_options")
    if cached is None or cached[0] != stored:
        cached = (copy.deepcopy(stored), LinAttnConfig.of(config))
        module.__dict__["_linattn_options"] = cached
    return cached[1]


def keeps_softmax(module: nn.Module, options: LinAttnConfig) -> bool:
    """Whether this module's layer is one of `softmax_layers`.

    Raises:
        ValueError: the option is set and the module does not know its layer's index.
    """
    if not options.softmax_layers:
        return False
    index = getattr(module, "layer_idx", None)
    if index is None:
        raise ValueError(f"{type(module).__name__} does not know its layer's index, so linattn option softmax_layers cannot apply to it.")
    return index in options.softmax_layers


def coefficients(module: nn.Module, options: LinAttnConfig, query: Tensor, scaling: float | None) -> dict[str, Any]:
    """a, b, c, temperature, log_decay and normalize_qk of a layer: its parameters where it has some, else the config's numbers."""
    numbers: dict[str, Any] = {"a": options.a, "b": options.b, "c": options.c, "temperature": options.temperature}
    if options.decay == "head":
        numbers["log_decay"] = starting_log_decay(query.shape[1], query.device)
    if hasattr(module, NAME):
        numbers.update(getattr(module, NAME)())
    elif options.learnable:
        raise ValueError(missing_parameters(type(module).__name__))
    if not options.normalize_qk:
        numbers["temperature"] = numbers["temperature"] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    numbers["normalize_qk"] = options.normalize_qk
    return numbers


def starting_log_decay(heads: int, device: torch.device | None = None) -> Tensor:
    """-1 / tau, float32 (heads,), tau from 1.5 to 512 tokens in equal ratios: the fixed rates of a model without parameters."""
    return -torch.logspace(-math.log10(FASTEST), -math.log10(SLOWEST), heads, device=device, dtype=torch.float32)


def noise(module: nn.Module, options: LinAttnConfig, dropout: Number) -> dict[str, Any]:
    """Noise dropout of this call: `linattn_dropout_p` of the module, else the config's, else the model's; none outside training."""
    if not module.training:
        return {}
    p: Number | None = getattr(module, "linattn_dropout_p", options.dropout)
    p = dropout if p is None else p
    if not isinstance(p, Tensor) and p == 0:
        return {}
    return {"dropout_p": p, "dropout_kind": options.dropout_kind}


def softmax_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    scaling: float | None,
    dropout: Number,
    is_causal: bool,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """The softmax of a layer that keeps it: SDPA, or the architecture's own eager form where it has a softcap or sinks.

    Raises:
        ValueError: sequences are packed together behind others in a cache, or in a cache of fixed length.
    """
    if starts is not None and key.shape[2] == query.shape[2]:
        mask = _same_sequence(mask, starts, is_causal)
    elif starts is not None:
        require(~starts.any(), PACKED_IN_A_CACHE)
    common = {"scaling": scaling, "dropout": dropout, **kwargs}
    if all(kwargs.get(name) is None for name in SDPA_HAS_NOT):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, is_causal=is_causal, **common)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2]) if is_causal else mask
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, **common)[0], None


def _same_sequence(mask: Tensor | None, starts: Tensor, causal: bool) -> Tensor:
    """A mask narrowed to keys of the query's own packed sequence."""
    runs = starts.cumsum(-1)
    same = (runs[:, :, None] == runs[:, None, :])[:, None]
    if mask is None:
        return same.tril() if causal else same
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)
