"""How a cache layer reaches the attention function: on the tensors that `update` returns, and on all that is computed from them.

`Cache.update` has no query, and the attention function no cache. Between the two a model may do as it likes with keys and values:
expand a latent, repeat heads, give them to a second call or to a later layer. So they are of a class of their own, which passes the
layer on through every operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .cache import LinearStateLayer

HANDED, PLAIN = "_linattn_layer", "_linattn_plain"
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, F.scaled_dot_product_attention)
NEVER_READ = (
    "A linear attention cache was handed keys that the attention function never read: the model no longer has "
    'attn_implementation="linattn", or does not use Transformers\' attention interface. Make a new cache for it.'
)

FILLED = (
    "A linear attention cache was filled with keys that the attention function never read: a prefix of PEFT's prefix tuning, for which a "
    "state has no place (use LoRA or prompt tuning instead), or those of a model that does not use Transformers' attention interface."
)


class Handed(Tensor):
    """A tensor that carries the cache layer it came through."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        if func in SOFTMAX:
            raise RuntimeError(NEVER_READ)
        kwargs = kwargs or {}
        result, all_given = super().__torch_function__(func, types, args, kwargs), (*args, *kwargs.values())
        for given in all_given:
            if isinstance(given, Handed):  # what was done to it may have been in place
                setattr(given, PLAIN, None)
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Handed) and not hasattr(made, HANDED):
                setattr(made, HANDED, _layer_among(all_given))
        return result


def _layer_among(args: Iterable[Any]) -> LinearStateLayer | None:
    """The layer of the first handed tensor among the arguments of a function, lists of tensors included."""
    for arg in args:
        layer = _layer_among(arg) if isinstance(arg, (tuple, list)) else getattr(arg, HANDED, None)
        if layer is not None:
            return layer
    return None


def hand_over(tensor: Tensor, layer: LinearStateLayer) -> Tensor:
    """The same numbers in a tensor that carries `layer`."""
    # a tensor that is of some class already, as in torch.export, can only be marked itself
    handed = tensor.as_subclass(Handed) if type(tensor) is Tensor else tensor.view(tensor.shape)
    setattr(handed, HANDED, layer)
    setattr(handed, PLAIN, tensor)
    return handed


def receive(tensor: Tensor) -> tuple[Tensor, LinearStateLayer | None]:
    """The same numbers in an ordinary tensor, and the layer they came through, if they came through one."""
    if type(tensor) is Tensor:  # nothing is marked that is of no other class
        return tensor, None
    layer: LinearStateLayer | None = getattr(tensor, HANDED, None)
    if not isinstance(tensor, Handed):
        return tensor, layer
    plain: Tensor | None = getattr(tensor, PLAIN, None)
    if plain is not None and not torch.compiler.is_compiling():
        return plain, layer
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.view(tensor.shape), layer
