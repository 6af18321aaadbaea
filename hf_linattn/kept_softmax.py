"""Static caches of the layers that keep softmax: Transformers' own, which go wherever the states of the linear layers beside them do.

Theirs have one dtype for keys and values, which under autocast are of two where rotary embedding is float32, and are written in place,
which PyTorch refuses outside of torch.inference_mode() where they were made within.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers import cache_utils
from transformers.cache_utils import StaticLayer

from .config import ATTENTION, NAME

KEPT = {kind: f"{NAME}_keeps_{kind}" for kind in ATTENTION}
"""The types of layers that keep softmax, by the types that Transformers gives them."""


def is_closed(tensor: Tensor) -> bool:
    """Whether it was made under torch.inference_mode() and is to be written outside, which PyTorch refuses."""
    return not is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled()


class KeptStaticLayer(StaticLayer):
    """Of softmax over all tokens; in front of another static layer of Transformers, what that does not do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._open()
        dtype = self.dtype if self.is_initialized else torch.promote_types(key_states.dtype, value_states.dtype)
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)

    def reset(self) -> None:
        self._open()
        super().reset()

    def _open(self) -> None:
        """Puts copies in the place of what cannot be written here."""
        for name in ("keys", "values", "cumulative_length"):
            tensor = getattr(self, name, None)
            if isinstance(tensor, Tensor) and is_closed(tensor):
                setattr(self, name, tensor.clone())
                torch._dynamo.mark_static_address(getattr(self, name))


def _kept(theirs: type) -> type:
    """A class of Transformers' static layers, with ours in front."""
    if theirs is StaticLayer:
        return KeptStaticLayer
    made = type(theirs.__name__, (KeptStaticLayer, theirs), {"__module__": __name__})
    return globals().setdefault(made.__name__, made)  # type: ignore[no-any-return]  # where pickle looks for it


def install() -> None:
    """Tells Transformers' caches which layers these types are: static ones of ours, and else its own."""
    dynamic, static = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING
    for kind, kept in KEPT.items():
        if kind in static:  # not every version has all
            dynamic[kept], static[kept] = dynamic[kind], _kept(static[kind])
