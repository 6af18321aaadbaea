"""A cache of constant size: each linear layer keeps one float32 state instead of its keys and values.

Transformers asks one function, `cache_utils.get_layer_types_and_kwargs`, which layer a cache holds for each layer of a model.
Wrapping it is the only patch. `update()` cannot compute attention, for it has no query: it hands itself to the attention
function on the key tensor it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import is_torchdynamo_compiling

from .config import NAME, softmax_layers
from .ops import empty_state
from .rollback import RecentTokens, Recurrence
from .support import require_attention_interface

HANDED = "_linattn_layer"
SOFTMAX_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


class LinearStateLayer(CacheLayerMixin):
    """The state of one linear attention layer: float32 (B, Hs, F, Dv + 1), whatever the number of tokens (float64 in such a model).

    Hs, F and the meaning of the state are those of `linear_attention`. The layer reports the masks of full attention
    (every token seen so far), so that softmax layers of a hybrid model get the masks they need.
    """

    _layer_type: str | None = NAME
    is_croppable = True
    is_sliding = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.cumulative_length: Any = 0
        self.state: Tensor | None = None
        self.record_past = False
        self._recent: RecentTokens | None = None
        self._awaited = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Counts the new tokens; returns their keys, which carry this layer to the attention function, and their values.

        Raises:
            RuntimeError: what `update` returned last time never reached the attention function.
        """
        if self._awaited:
            raise RuntimeError(
                "A linear attention cache was handed keys that the attention function never read: the model no longer has "
                'attn_implementation="linattn", or does not use Transformers\' attention interface. Make a new cache for it.'
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._advance(key_states.shape[-2])
        self._awaited = True
        key_states = key_states.view(key_states.shape)  # an object of its own: the caller's tensor is not to be tagged
        setattr(key_states, HANDED, self)
        return key_states, value_states

    def _advance(self, tokens: Any) -> None:
        self.cumulative_length += tokens

    def is_first(self, tokens: int) -> bool:
        """Whether the `tokens` just counted by `update` are the first ones."""
        return self.cumulative_length == tokens

    def allocate(self, key: Tensor, value: Tensor, heads: int, quadratic: bool) -> Tensor:
        """The state for keys (B, Hk, N, D) and values (B, Hk, N, Dv), made of zeros if there is none yet."""
        if self.state is None:
            dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
            batch, head_dim, value_dim = key.shape[0], key.shape[-1], value.shape[-1]
            self.state = empty_state(batch, heads, head_dim, value_dim, degree=2 if quadratic else 1, device=key.device, dtype=dtype)
        elif not is_torchdynamo_compiling() and self.state.is_inference() and not torch.is_inference_mode_enabled():
            self.state = self.state.clone()  # made under torch.inference_mode(), it could not be written outside
        return self.state

    def record(self, recurrence: Recurrence, key: Tensor, value: Tensor, real: Tensor | None, before: Tensor | None) -> None:
        """Keeps new tokens for a later `crop`, if `activate_past_recording` asked for it; `before` is the state before them."""
        if not self.record_past:
            self._recent = None
            return
        if self._recent is None:
            self._recent = RecentTokens(None if before is None else before.clone(), recurrence)
        self._recent.append(key, value, real)

    def write(self, state: Tensor) -> None:
        """Puts a new state in place of the old one. No gradient flows from one call of the model to the next."""
        self.state = state.detach()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """From the next token on, keeps the recent keys and values, so that `crop` can take tokens back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last `-tokens_to_remove` tokens back out of the state.

        Raises:
            ValueError: `tokens_to_remove` is positive.
            RuntimeError: more tokens than were recorded.
        """
        count = -tokens_to_remove
        if count < 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}.")
        if count == 0:
            return
        recorded = 0 if self._recent is None else self._recent.count
        if count > recorded or self._recent is None:
            raise RuntimeError(
                f"A linear attention cache cannot take {count} tokens back: it has recorded the last {recorded}. Call "
                "cache.activate_past_recording() before the tokens that may have to go, or start again from an empty cache."
            )
        state = self._recent.drop(count)
        if self.state is not None:
            self.write(torch.zeros_like(self.state) if state is None else state.clone())
        self._advance(-count)

    def reset(self) -> None:
        self._advance(-self.cumulative_length)
        if self.state is not None:
            self.write(torch.zeros_like(self.state))
        self._recent, self._awaited = None, False

    def offload(self) -> None:
        """Nothing: the state is small, and stays where it is."""

    def prefetch(self) -> None:
        """Nothing: the state was never moved away."""

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = function(self.state)
            self.batch_size = self.state.shape[0]
        if self._recent is not None:
            self._recent.map_batch(function)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_batch(lambda x: x[indices])


class StaticLinearStateLayer(LinearStateLayer):
    """The same with a fixed address and the length on the device, so that compiled decoding is one graph for all lengths."""

    _layer_type = None
    is_compileable = True

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.cumulative_length = torch.tensor(0, dtype=torch.long)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not is_torchdynamo_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)

    def _advance(self, tokens: Any) -> None:
        self.cumulative_length.add_(tokens)

    def is_first(self, tokens: int) -> bool:
        return False  # not known without waiting for the device; a state of zeros says the same

    def allocate(self, key: Tensor, value: Tensor, heads: int, quadratic: bool) -> Tensor:
        is_new = self.state is None
        state = super().allocate(key, value, heads, quadratic)
        if is_new and not is_torchdynamo_compiling():
            torch._dynamo.mark_static_address(state)
        return state

    def write(self, state: Tensor) -> None:
        if self.state is None or (torch.is_grad_enabled() and state.requires_grad):
            self.state = state.detach()  # the old one may be saved for backward
        else:
            self.state.copy_(state)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len


def take_layer(key: Tensor) -> LinearStateLayer | None:
    """The layer that handed this key tensor over, None where the call has no cache of ours."""
    layer: LinearStateLayer | None = getattr(key, HANDED, None)
    if layer is not None:
        layer._awaited = False
    return layer


_layer_types = cache_utils.get_layer_types_and_kwargs


def get_layer_types_and_kwargs(config: PreTrainedConfig) -> tuple[list[str], Any]:
    """Transformers' own answer, with "linattn" for the linear layers of a model with `attn_implementation="linattn"`."""
    types, kwargs = _layer_types(config)
    if config._attn_implementation == NAME:
        require_attention_interface(config)
        kept = softmax_layers(config)
        types = [NAME if layer not in kept and kind in SOFTMAX_TYPES else kind for layer, kind in enumerate(types)]
    return types, kwargs


def install() -> None:
    """Makes Transformers build caches with our layers."""
    cache_utils.STATIC_LAYER_TYPE_MAPPING[NAME] = StaticLinearStateLayer
    cache_utils.get_layer_types_and_kwargs = get_layer_types_and_kwargs
