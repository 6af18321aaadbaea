"""What the attention layers of a converted checkpoint must give: the source's own modules, run with the quadratic form in float64.

Layers are looked at one by one, each on the hidden states that enter it in the source. So nothing here knows the converted model, and
no layer amplifies the rounding of another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from convert.errors import ConversionError
from hf_linattn.config import LinAttnConfig
from hf_linattn.forms import Call, Numbers
from hf_linattn.models import attention_modules

_QUADRATIC_FORM = "linattn_quadratic_form"
_LONGEST = 2048  # tokens: at most the time constant of the slowest head


@dataclass(frozen=True)
class LayerTruth:
    """One attention layer of the source.

    Attributes:
        hidden: what enters it (1, N, width), in the checkpoint's dtype.
        exact: what must leave it (1, N, width), by the formula in float64.
        plain: the same formula in plain PyTorch, by dtype: the checkpoint's, and float32 where that is less.
        numbers: what the form starts with: a number or float64 (heads,) each; None for a layer that keeps softmax.
    """

    hidden: Tensor
    exact: Tensor
    plain: dict[torch.dtype, Tensor]
    numbers: Numbers | None


@torch.no_grad()
def layer_truths(model: PreTrainedModel, tokens: Tensor, options: LinAttnConfig) -> dict[str, LayerTruth]:
    """The truth of every attention layer by its name; ``model`` is the source's, with ``attn_implementation="eager"``.

    Raises:
        ConversionError: an attention module that does not call Transformers' attention interface.
    """
    calls: dict[str, tuple[Any, Any]] = {}
    modules = dict(attention_modules(model))

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: calls.update({name: (args, kwargs)})

    hooks = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    config: Any = model.config.get_text_config(decoder=True)
    longest = min(getattr(config, "max_position_embeddings", None) or _LONGEST, _LONGEST)
    return {name: _layer_truth(name, modules[name], call, options, longest) for name, call in calls.items()}


def precisions(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What layers stored in ``dtype`` are run in: half precision hides small slips, so it is not enough."""
    return (dtype, torch.float32) if dtype.itemsize < 4 else (dtype,)


def hidden_states(args: Any, kwargs: Any) -> Tensor:
    """The hidden states among the arguments of an attention module."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def attention_output(output: Any) -> Tensor:
    """What an attention module gives, without the attention weights that may stand beside it."""
    return output[0] if isinstance(output, tuple) else output


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A copy of nested arguments with their floating-point tensors in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(cast(item, dtype) for item in value)
    return {key: cast(item, dtype) for key, item in value.items()} if isinstance(value, dict) else value


def _layer_truth(name: str, module: nn.Module, call: tuple[Any, Any], options: LinAttnConfig, longest: int) -> LayerTruth:
    hidden = hidden_states(*call)
    copied: Any = copy.deepcopy(module)
    linear = module.layer_idx not in options.softmax_layers
    if linear:
        copied.config._attn_implementation = _QUADRATIC_FORM
        copied.options, copied.longest = options, longest
    plain = {dtype: _run(copied, call, dtype) for dtype in precisions(hidden.dtype)}
    if linear and not hasattr(copied, "numbers"):
        raise ConversionError(f"{name} ({type(module).__name__}) does not call Transformers' attention interface; nothing was kept")
    return LayerTruth(hidden, _run(copied, call, torch.float64), plain, copied.numbers if linear else None)


def _run(module: nn.Module, call: tuple[Any, Any], dtype: torch.dtype) -> Tensor:
    args, kwargs = cast(call, dtype)
    return attention_output(module.to(dtype)(*args, **kwargs))


def _quadratic_form(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, sliding_window: int | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as the interface calls it; the window that it is called with bounds where a decay starts."""
    call, form = Call(query, key, value, scaling=kwargs.get("scaling")), module.options.attention
    sizes = replace(call.sizes, longest=min(module.longest, sliding_window or module.longest))
    module.numbers = form.starting_numbers(sizes, module.options.learnable)
    return form.reference(call, module.numbers).transpose(1, 2).contiguous(), None


AttentionInterface.register(_QUADRATIC_FORM, _quadratic_form)
