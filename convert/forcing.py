"""A model run with given hidden states at the door of every attention layer, so that no layer feels another's error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convert.errors import ConversionError, stage
from convert.truth import attention_output, cast
from hf_linattn.models import attention_modules


@torch.no_grad()
def teacher_forced(model: Any, hidden: dict[str, Tensor], tokens: Tensor, pieces: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """What each attention layer gives when ``hidden`` enters it; rotary embedding, masks and cache are the model's own.

    Args:
        model: a model in evaluation mode.
        hidden: by the name of the attention module, (1, N, width).
        tokens: (1, N).
        pieces: lengths that add up to N; more than one go through the model's cache.
        dtype: what the attention modules run in; all else stays in the model's dtype.

    Returns:
        (1, N, width) in ``dtype`` by name.

    Raises:
        ConversionError: the model does not run, or gives numbers that are not finite.
    """
    layers = {name: _ForcedLayer(module, hidden[name], dtype) for name, module in attention_modules(model) if name in hidden}
    cache, at = None, 0
    try:
        for length in pieces:
            for layer in layers.values():
                layer.piece = slice(at, at + length)
            with stage("running the converted model", "nothing was kept"):
                out = model(tokens[:, at : at + length], past_key_values=cache, use_cache=len(pieces) > 1)
            cache, at = getattr(out, "past_key_values", None), at + length
            if not torch.isfinite(out[0]).all():
                raise ConversionError("the converted model gives results that are not finite numbers; nothing was kept")
    finally:
        for layer in layers.values():
            layer.remove()
    return {name: torch.cat(layer.given, 1) for name, layer in layers.items()}


class _ForcedLayer:
    """The hooks of one attention module: its hidden states are replaced as it is entered, and what it gives is kept."""

    def __init__(self, module: nn.Module, hidden: Tensor, dtype: torch.dtype) -> None:
        self.hidden, self.dtype = hidden, dtype
        self.piece = slice(None)
        self.given: list[Tensor] = []
        self.stored = {name: value.dtype for name, value in module.state_dict(keep_vars=True).items()}
        self._hooks = (
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave),
        )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        forced = self.hidden[:, self.piece]
        args, kwargs = ((), kwargs | {"hidden_states": forced}) if "hidden_states" in kwargs else ((forced, *args[1:]), kwargs)
        if self.dtype == self.hidden.dtype:
            return args, kwargs
        module.to(self.dtype)
        return cast(args, self.dtype), cast(kwargs, self.dtype)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.given.append(attention_output(output))
        if self.dtype == self.hidden.dtype:
            return output
        for name, value in module.state_dict(keep_vars=True).items():
            value.data = value.data.to(self.stored[name])
        return cast(output, self.hidden.dtype)
