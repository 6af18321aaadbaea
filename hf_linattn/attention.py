"""The attention function that Transformers calls in every attention module of a model with `attn_implementation="linattn"`."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .architectures import missing_parameters
from .cache import LinearStateLayer, take
from .calls import STATE_FOR_KEYS, refuse_unknown_calls, warn_about_dropped
from .config import NAME, LinAttnConfig, known_options
from .forms import FORMS, Call, Form, LinAttnParams, Numbers
from .packing import segment_ids, sequence_starts
from .pattern import Pattern, is_packed
from .told import made_pattern, pattern_of, refuse_another_past
from .values import attribute, require

Number = float | Tensor
KEEPS_SOFTMAX = "linattn_keeps_softmax"
"""Of a converted model's attention modules: `softmax_layers` as they were loaded, and whether theirs is among them. A compiled graph that
asks for a layer's index is that layer's alone."""
NOTHING_LEARNED = (
    "config.linattn asks {} for numbers that it has not learned: it kept softmax, or had nothing beside its window, when the model was "
    "loaded; set softmax_layers and beside back, or convert the source again with the others."
)
FREE = ("window", "sinks")
"""Options that a converted model may be given others of at any time."""
SDPA_HAS_NOT = ("softcap", "s_aux", "sinks")  # what shapes softmax scores and PyTorch's SDPA has no argument for
PACKED_IN_A_CACHE = (
    "Positions fall, so sequences are packed together, and the softmax layers of this model cannot tell them apart in a cache that is "
    "longer than these tokens; give packed sequences use_cache=False."
)


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
        if layer is not None:
            raise ValueError(STATE_FOR_KEYS)
        made = made_pattern(attention_mask, length)
        starts = None if made is None else sequence_starts(made.real, position_ids, cu_seq_lens_q, length)
        if made is not None and is_packed(attention_mask):
            is_causal, attention_mask = is_causal if made.causal is None else made.causal, None
        return softmax_attention(module, query, key, value, attention_mask, starts, scaling, dropout, is_causal, kwargs)
    refuse_unknown_calls(module, length, key.shape[2], kwargs)
    warn_about_dropped(module, kwargs)
    first = layer is None or layer.is_first(length)
    pattern = pattern_of(attention_mask, length, 0 if layer is None else layer.seen_before(length), module, is_causal)
    causal = bool(pattern.causal) or (length == 1 and not first)  # the last token sees all of them either way
    if layer is not None and not first and (layer.is_incomplete or not causal):
        raise ValueError("A cache holds what came before; bidirectional linear attention cannot go on from it. Give use_cache=False.")
    if layer is not None:  # of the first tokens no mask tells of others before them
        refuse_another_past(layer.left_out, pattern, getattr(module, "layer_idx", None))

    segments = segments_of(pattern, position_ids, cu_seq_lens_q, length, query.shape[0])
    form, parameters = options.attention, parameters_of(module, options)
    hidden = None if parameters is None else parameters.take_hidden_states()
    is_few = layer is not None and length <= few(form)
    kept = None if layer is None else layer.made(parameters, is_few)
    call = Call(query, key, value, segments, causal, scaling, noise(module, options, dropout), hidden, window_drop(module), kept)
    numbers = form.numbers(call, parameters)
    if layer is None or not form.keeps_state(call, numbers):
        if layer is not None:
            layer.is_incomplete = True
        out = form.attend(call, numbers)
    else:
        out = attend_with_state(form, layer, first, is_few, call, numbers)
        if pattern.real is not None:
            layer.leave_out(~pattern.real.expand(query.shape[0], -1))
    return out.transpose(1, 2).contiguous(), None


def segments_of(pattern: Pattern, position_ids: Tensor | None, cu_seq_lens: Tensor | None, length: int, batch: int) -> Tensor | None:
    """What the operator is given: padding, and where sequences begin by the mask, by `cu_seq_lens` or by falling positions."""
    starts = pattern.starts
    if length > 1 and not pattern.whole:
        told = sequence_starts(pattern.real, position_ids, cu_seq_lens, length)
        starts = told if starts is None else starts if told is None else starts | told
    return segment_ids(pattern.real, starts, batch)


def attend_with_state(form: Form, layer: LinearStateLayer, first: bool, is_few: bool, call: Call, numbers: Numbers) -> Tensor:
    """Attention over the state and the new tokens; leaves the state after them in `layer`."""
    layer.be_of(form)
    before = None if first else layer.allocate(form, lambda: call.sizes, call.query.shape[2])
    if call.is_packed:
        layer.forget_recent()
    else:
        layer.record(form, call, numbers, before)
    is_plain = not (call.is_packed or call.noise or _needs_grad(call.query, call.key, call.value, *numbers.values()))
    if before is not None and is_few and is_plain:
        return form.step(call, numbers, before)
    out, after = form.attend_from(call, numbers, before)
    layer.write(after)
    return out


def few(form: Form) -> int:
    """How many tokens go on from a state in place. A length that varies in a graph is compared with no more than 1."""
    return 1 if is_compiling() else form.FEW


def _needs_grad(*given: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)


def options_of(module: nn.Module) -> LinAttnConfig:
    """`LinAttnConfig.of(module.config)`, checked once per content of `config.linattn`, not once a token."""
    config: Any = module.config
    if is_compiling():  # an edit is seen by PyTorch's guards, which then trace it anew
        options = LinAttnConfig.of(config)
        refuse_another_than_was_learned(module, options)
        return options
    stored = attribute(config, NAME, None)
    cached = module.__dict__.get("_linattn_options")
    if cached is None or cached[0] != stored:
        cached = (copy.deepcopy(stored), known_options(config))
        refuse_another_than_was_learned(module, cached[1])
        module.__dict__["_linattn_options"] = cached
    return cached[1]


def refuse_another_than_was_learned(module: nn.Module, options: LinAttnConfig) -> None:
    """Refuses options that were changed in the config of a converted model, where a layer's numbers have been made by others.

    Raises:
        ValueError: one was; of a window its size and its sinks alone are no matter of numbers.
    """
    parameters: Any = getattr(module, NAME, None)
    learned = getattr(parameters, "options", None)
    if learned is None:
        return
    now = options.attention.named() | {"learnable": options.learnable}  # what was learned since the start would be saved, and not loaded
    for name, made in (form_of(learned).named() | {"learnable": parameters.learnable}).items():
        if name not in FREE and now[name] != made:
            raise ValueError(
                f"config.linattn says {name}={now[name]!r}, and the numbers that {type(module).__name__} has learned are of "
                f"{name}={made!r}; set it back, or convert the source again with the other."
            )


def form_of(options: Any) -> Form:
    """The form that these are options of."""
    return next(form for form in FORMS.values() if type(options) is form.Options)(options)


def keeps_softmax(module: nn.Module, options: LinAttnConfig) -> bool:
    """Whether this module's layer is one of `softmax_layers`.

    Raises:
        ValueError: the option is set and the module does not know its layer's index.
    """
    if not options.softmax_layers:
        return False
    known: tuple[list[int], bool] | None = getattr(module, KEEPS_SOFTMAX, None)
    if known is not None and known[0] == options.softmax_layers:
        return known[1]
    return index_of(module) in options.softmax_layers


def index_of(module: nn.Module) -> int:
    """The index of an attention module's layer.

    Raises:
        ValueError: it does not know it, as one that serves several layers.
    """
    index: int | None = getattr(module, "layer_idx", None)
    if index is None or index < 0:
        raise ValueError(
            f"{type(module).__name__} does not know its layer's index, so linattn option softmax_layers cannot apply to it; leave it empty."
        )
    return index


def parameters_of(module: nn.Module, options: LinAttnConfig) -> LinAttnParams | None:
    """What a layer has learned, None where it has nothing of its own.

    Raises:
        ValueError: the options say that it has, and it has not.
    """
    parameters: Any = getattr(module, NAME, None) if is_compiling() else module._modules.get(NAME)  # where Module itself looks last
    if parameters is None and options.learnable and options.attention.learns:
        name = type(module).__name__
        raise ValueError(NOTHING_LEARNED.format(name) if hasattr(module, KEEPS_SOFTMAX) else missing_parameters(name))
    return parameters


def noise(module: nn.Module, options: LinAttnConfig, dropout: Number) -> dict[str, Any]:
    """Noise dropout of this call: `linattn_dropout_p` of the module, else the config's, else the model's; none outside training."""
    if not module.training:
        return {}
    p: Number | None = attribute(module, "linattn_dropout_p", options.dropout)
    p = dropout if p is None else p
    if not isinstance(p, Tensor) and p == 0:
        return {}
    return {"dropout_p": p, "dropout_kind": options.dropout_kind}


def window_drop(module: nn.Module) -> Number:
    """`linattn_window_drop` of the module in training (`hf_linattn.dropout.set_window_drop`), else 0."""
    return attribute(module, "linattn_window_drop", 0.0) if module.training else 0.0


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
        mask = mask.tril() if is_causal and query.shape[2] > 1 else mask  # as SDPA: behind the tokens a static cache has empty keys
    if mask.dtype == torch.bool:
        mask = mask | ~mask.any(-1, keepdim=True)  # of no keys at all there is no softmax, and padding would be no number
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, **common)[0], None


def _same_sequence(mask: Tensor | None, starts: Tensor, causal: bool) -> Tensor:
    """A mask narrowed to keys of the query's own packed sequence."""
    runs = starts.cumsum(-1)
    same = (runs[:, :, None] == runs[:, None, :])[:, None]
    if mask is None:
        return same.tril() if causal else same
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)
