"""A cache of constant size: each linear layer keeps what its form of attention says instead of its keys and values.

Transformers asks one function, `cache_utils.get_layer_types_and_kwargs`, which layer a cache holds for each layer of a model.
Wrapping it is the only patch here. `update()` cannot compute attention, for it has no query: it hands itself to the attention
function on the tensors it returns (see `hand_over`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import CacheLayerMixin, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from .config import ATTENTION, NAME, known_options, layer_types, softmax_layers
from .counted import digest, joined
from .forms import Call, Form, LinAttnParams, Numbers, Sizes, State
from .forms.kept import Kept, Made
from .hand_over import FILLED, NEVER_READ, hand_over, receive
from .kept_softmax import KEPT, is_closed
from .rollback import KEPT_TOKENS, RecentTokens
from .support import require_attention_interface

MIXED = NAME + "_mixed"
STATE = "state."
"""Begins the names of a state's tensors among those of a layer."""
OUR_TYPES = {kind: MIXED if kind.startswith("hybrid") else NAME for kind in ATTENTION}


class LinearStateLayer(CacheLayerMixin):
    """The state of one linear attention layer, as its form lays it out, whatever the number of tokens.

    The layer reports the masks of full attention (every token seen so far), so that softmax layers of a hybrid model get the masks they
    need.

    Where the attention function reads one update several times, as differential attention and layers that share keys do, each
    reader has a state of its own: the first one this layer's, the n-th that of the n-th in `_more`.
    """

    _layer_type: str | None = NAME
    is_croppable = True
    is_sliding = False

    def __init__(self, form: Form | None = None, query_heads: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.form, self._query_heads = form, query_heads
        self._state: State | None = None
        self.cumulative_length: Any = 0
        self.record_past = False
        self.is_incomplete = False  # whether there were tokens that no state could take in, seen both ways under a decay or packed
        self._recent: RecentTokens | None = None
        self._kept = Kept()
        self._reads: int | None = None  # how often the last update was read; None before the first
        self._may_grow = False  # whether the last update was the first, so that there can be new readers
        self._more: list[LinearStateLayer] = []

    @property
    def state(self) -> State | None:
        """What the form keeps of all tokens so far, by name; None before the first."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state = state
        self.keys = next(iter(state.values()))  # under the name of what Transformers registers as a buffer to export, and moves

    def nbytes(self) -> int:
        """Bytes of the state and of what was recorded for `crop`, of all readers."""
        own = 0 if self._state is None else sum(tensor.nbytes for tensor in self._state.values())
        recent = 0 if self._recent is None else self._recent.nbytes()
        return own + recent + sum(reader.nbytes() for reader in self._more)

    @property
    def left_out(self) -> Tensor | None:
        """The digest of the padding seen, int64 (B,), under the other name that is exported; None: there was none."""
        return self.values

    @left_out.setter
    def left_out(self, left_out: Tensor | None) -> None:
        self.values = left_out

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._begin(key_states.dtype, key_states.device, key_states.shape[0])
        if key_states.shape[-2] == 0 and self.form is not None:  # ahead of the first token, to export
            heads = self._query_heads or key_states.shape[1]
            self.allocate(self.form, lambda: Sizes(heads, key_states.shape[1], key_states.shape[-1], value_states.shape[-1]), 0)
            self.left_out = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)

    def _begin(self, dtype: torch.dtype, device: torch.device, batch_size: int) -> None:
        self.dtype, self.device, self.batch_size, self.is_initialized = dtype, device, batch_size, True

    def to_tensors(self) -> State:
        """All that later tokens need of those so far, of all readers, by name; what was recorded for `crop` is not among it."""
        tensors = {STATE + name: tensor for name, tensor in (self.state or {}).items()}
        if self.left_out is not None:
            tensors["left_out"] = self.left_out
        for number, reader in enumerate(self._more, 1):
            tensors |= {f"{number}.{name}": tensor for name, tensor in reader.to_tensors().items()}
        return tensors

    def from_tensors(self, tensors: State, tokens: int, dtype: torch.dtype) -> None:
        """Puts the `to_tensors()` of a layer that has seen so many tokens, in a model of `dtype`, into this new one."""
        state = below(STATE, tensors)
        first = next(iter(state.values()))
        self._begin(dtype, first.device, first.shape[0])
        self.state = state
        if "left_out" in tensors:
            self._remember(tensors["left_out"])
        while of_reader := below(f"{len(self._more) + 1}.", tensors):
            reader = self._another()
            reader.from_tensors(of_reader, 0, dtype)
            self._more.append(reader)
        self._advance(tokens)
        self._reads = 1 + len(self._more)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Counts the new tokens; returns their keys and values, which carry this layer to the attention function.

        Raises:
            RuntimeError: what was handed over before, by this layer or by one below, was not read as often as it should be.
            ValueError: the state is of more or fewer sequences.
        """
        key_states, value_states = _received_by_update(key_states), _received_by_update(value_states)
        shape = key_states.shape
        if self._reads == 0:
            raise RuntimeError(FILLED if self._may_grow else NEVER_READ)
        if self._reads is not None and self._reads != 1 + len(self._more):
            raise RuntimeError(_reads_differ(self._reads, 1 + len(self._more)))
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif not is_compiling() and self._state is not None and shape[0] != self.batch_size:
            raise ValueError(
                f"The cache holds {self.batch_size} sequences, and {shape[0]} are to go on from it; repeat those of the cache "
                "(cache.batch_repeat_interleave, or copies of load_cache), or give as many as it holds."
            )
        self._advance(shape[-2])
        self._may_grow, self._reads = self._reads is None, 0
        return hand_over(key_states, self), hand_over(value_states, self)

    def next_reader(self) -> LinearStateLayer:
        """The layer with the state of whoever reads the last update now.

        Raises:
            RuntimeError: the updates before were read less often.
        """
        number = self._reads or 0
        self._reads = number + 1
        if number == 0:
            return self
        if number > len(self._more):
            if not self._may_grow:
                raise RuntimeError(_reads_differ(number + 1, number))
            self._more.append(self._another())
        reader = self._more[number - 1]
        reader.dtype, reader.device, reader.batch_size = self.dtype, self.device, self.batch_size
        reader.cumulative_length = self.cumulative_length
        reader.record_past = self.record_past
        return reader

    def _another(self) -> LinearStateLayer:
        return LinearStateLayer()

    def _advance(self, tokens: Any) -> None:
        self.cumulative_length += tokens

    def is_first(self, tokens: int) -> bool:
        """Whether the `tokens` just counted by `update` are the first ones."""
        return self.cumulative_length == tokens

    def seen_before(self, tokens: int) -> Any:
        """How many tokens there were before the `tokens` just counted by `update`, an int or a tensor."""
        return self.cumulative_length - tokens

    def be_of(self, form: Form) -> None:
        """Remembers the form that the first state is of, and refuses another one's.

        Raises:
            ValueError: the state is there, and of other options.
        """
        before = self.form
        if before is not None and before is not form and self.state is not None:
            now = form.named()
            for name, seen in before.named().items():
                if now[name] != seen:
                    raise ValueError(
                        f"The cache holds what a model with linattn option {name}={seen!r} has seen, and this one has {now[name]!r}; give "
                        "each model a cache of its own."
                    )
        if not is_compiling():
            self.form = form

    def made(self, parameters: LinAttnParams | None, few: bool) -> Made | None:
        """What was made of the layer's numbers at the tokens before, see `Kept`, where those to come are few; None where nothing is kept,
        as by a graph that is compiled or captured, which would read it at the next text as well."""
        if is_compiling() or (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return None
        if not few:
            self._kept.forget()
            return None
        return self._kept.of(() if parameters is None else parameters.tensors())

    def leave_out(self, padding: Tensor) -> None:
        """Remembers which of the tokens just counted by `update` are padding, bool (B, N)."""
        new = digest(padding, self.seen_before(padding.shape[-1]))
        self._remember(new if self.left_out is None else joined(self.left_out, new))

    def _remember(self, left_out: Tensor) -> None:
        self.left_out = left_out

    def allocate(self, form: Form, sizes: Callable[[], Sizes], tokens: int) -> State:
        """The state before the `tokens` just counted, empty if there is none yet."""
        state = self._state
        if state is None:
            state = self.state = form.empty_state(sizes(), self.batch_size, self.dtype, self.device)
        elif is_closed(next(iter(state.values()))):
            state = self.state = _each(torch.clone, state)
        return state

    def forget_recent(self) -> None:
        """No token seen so far can be taken back: what was packed together is not taken apart again."""
        self._recent = None

    def record(self, form: Form, call: Call, numbers: Numbers, before: State | None) -> None:
        """Keeps new tokens for a later `crop`, if `activate_past_recording` asked for it; `before` is the state before them."""
        if not self.record_past:
            self._recent = None
            return
        if self._recent is None:
            advance = functools.partial(form.advance, numbers=numbers, query_heads=call.query.shape[1])
            self._recent = RecentTokens(None if before is None else _each(torch.clone, before), advance)
        self._recent.append(form.tokens(call, numbers), call.segments)

    def write(self, state: State) -> None:
        """Puts a new state in place of the old one. No gradient flows from one call of the model to the next."""
        self.state = _each(Tensor.detach, state)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """From the next token on, keeps the recent keys and values, so that `crop` can take tokens back."""
        self.record_past = True

    def stop_past_recording(self) -> None:
        """From now on no token can be taken back, and what was recorded is let go."""
        self.record_past = False
        for reader in (self, *self._more):
            reader._recent = None

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
                f"A linear attention cache cannot take {count} tokens back: it has recorded the last {recorded}, and keeps {KEPT_TOKENS} "
                "however many come. Draft fewer at once, call cache.activate_past_recording() before the tokens that may have to go, or "
                "start again from an empty cache."
            )
        for reader in (self, *self._more):
            reader._take_back(count)
        self._advance(-count)

    def _take_back(self, count: int) -> None:
        if self.left_out is not None and self._recent is not None:
            dropped = digest(self._recent.padding(count), self.seen_before(count))
            self._remember(joined(self.left_out, -dropped))
        state = None if self._recent is None else self._recent.drop(count)
        if self.state is not None:
            self.write(_each(torch.zeros_like, self.state) if state is None else _each(torch.clone, state))

    def reset(self) -> None:
        self._advance(-self.cumulative_length)
        for reader in (self, *self._more):
            if reader.state is not None:
                reader.write(_each(torch.zeros_like, reader.state))
            if reader.left_out is not None:
                reader._remember(torch.zeros_like(reader.left_out))
            reader._kept.forget()
            reader._recent, reader.is_incomplete = None, False
        self._reads = None

    def offload(self) -> None:
        """Nothing: the state is small, and stays where it is."""

    def prefetch(self) -> None:
        """Nothing: the state was never moved away."""

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = _each(function, self.state)
            self.batch_size = next(iter(self.state.values())).shape[0]
        if self.left_out is not None:
            self.left_out = function(self.left_out)
        if self._recent is not None:
            self._recent.map_batch(function)
        for reader in self._more:
            reader._map_batch(function)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_batch(lambda x: x[indices])


def _is_exporting() -> bool:
    # Not torch.compiler.is_exporting(), which Dynamo of torch 2.11 takes for true in torch.compile as well.
    return bool(torch.compiler._is_exporting_flag)


class StaticLinearStateLayer(LinearStateLayer):
    """The same with a fixed address and the length on the device, so that compiled decoding is one graph for all lengths."""

    _layer_type = None
    is_compileable = True

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_cache_len = max_cache_len
        self.cumulative_length = torch.tensor(0, dtype=torch.long)

    def _begin(self, dtype: torch.dtype, device: torch.device, batch_size: int) -> None:
        super()._begin(dtype, device, batch_size)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not is_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)

    def from_tensors(self, tensors: State, tokens: int, dtype: torch.dtype) -> None:
        super().from_tensors(tensors, tokens, dtype)
        for tensor in (self.state or {}).values():
            torch._dynamo.mark_static_address(tensor)

    def _advance(self, tokens: Any) -> None:
        if is_closed(self.cumulative_length):
            self.cumulative_length = self.cumulative_length.clone()
        self.cumulative_length.add_(tokens)

    def _another(self) -> LinearStateLayer:
        return StaticLinearStateLayer(self.max_cache_len)

    def is_first(self, tokens: int) -> bool:
        return False  # not known without waiting for the device; a state of zeros says the same

    def allocate(self, form: Form, sizes: Callable[[], Sizes], tokens: int) -> State:
        is_new, exporting = self.state is None, _is_exporting()
        if exporting and len(form.layout(sizes(), self.dtype)) > 1:
            raise RuntimeError(
                f'torch.export carries one tensor a cache layer, and linattn option form="{form.name}" keeps more; export it with '
                "use_cache=False, or decode with torch.compile."
            )
        if is_new and exporting:
            raise RuntimeError(
                "torch.export can carry only a state that is there before it begins (cache.early_initialization makes it): not that of a "
                "second reader of one update, nor of a layer that holds a recurrence besides."
            )
        state = super().allocate(form, sizes, tokens)
        for tensor in state.values():
            if is_new and not is_compiling():
                torch._dynamo.mark_static_address(tensor)
            if exporting:  # an exported program has no reset: Transformers begins a new text in it by setting the length to 0
                tensor.masked_fill_(self.cumulative_length == tokens, 0)
        return state

    def write(self, state: State) -> None:
        saved_for_backward = torch.is_grad_enabled() and not _is_exporting()
        if saved_for_backward and any(tensor.requires_grad for tensor in state.values()):
            self.state = _each(Tensor.detach, state)
            return
        assert self.state is not None  # as `allocate` leaves it
        if is_closed(next(iter(self.state.values()))):
            self.state = _each(torch.clone, self.state)
        for name, tensor in self.state.items():
            tensor.copy_(state[name].detach())

    def _remember(self, left_out: Tensor) -> None:
        if self.left_out is not None and (is_compiling() or not self.left_out.is_inference()):
            self.left_out.copy_(left_out)
            return
        self.left_out = left_out
        if not is_compiling():
            torch._dynamo.mark_static_address(self.left_out)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len


class MixedLayer(LinearStateLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """The state of an attention beside the states of a Mamba, convolution or other recurrence in the same layer of a model."""

    _layer_type: str | None = MIXED
    is_croppable = LinearAttentionLayer.is_croppable  # type: ignore[assignment]

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Positional arguments are our keys and values; keywords belong to the recurrence, as in Transformers' own mixed layers."""
        if args:
            super().lazy_initialization(*args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        super().reset()

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._map_batch(function)
        for states in (self.conv_states, self.recurrent_states):
            states.update({index: function(state) for index, state in states.items() if state is not None})


class StaticMixedLayer(MixedLayer, StaticLinearStateLayer):  # type: ignore[misc]
    """The same for compiled decoding."""

    _layer_type = None
    is_compileable = True


def take(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, LinearStateLayer | None]:
    """Keys and values as ordinary tensors, and the layer whose state goes before them; None where the call has no cache of ours.

    Raises:
        ValueError: the model made more or fewer keys of those that the cache returned.
    """
    key, layer = receive(key)
    value, other = receive(value)
    layer = layer or other
    if layer is None:
        return key, value, None
    if key.shape[-2] != query.shape[-2]:
        raise ValueError(
            f"The model puts other keys beside those of its cache, {key.shape[-2]} for {query.shape[-2]} new tokens, and linear attention "
            'keeps no keys to put them beside; load it with attn_implementation="sdpa".'
        )
    return key, value, layer.next_reader()


def _each(function: Callable[[Tensor], Tensor], state: State) -> State:
    return {name: function(tensor) for name, tensor in state.items()}


def below(prefix: str, tensors: State) -> State:
    """Those whose names begin with `prefix`, called without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _received_by_update(tensor: Tensor) -> Tensor:
    """Raises if the tensor was computed from what another layer handed over, and nobody has read that."""
    tensor, layer = receive(tensor)
    if layer is not None and layer._reads == 0:
        raise RuntimeError(NEVER_READ)
    return tensor


def _reads_differ(now: int, before: int) -> str:
    return (
        f"The attention function has read one update of a linear attention cache {now} times, and the one before {before} times, so that "
        "the states of its readers no longer belong together. Every call of a model with one cache must run the same layers."
    )


def cache_bytes(cache: cache_utils.Cache) -> int:
    """Bytes that a cache of Transformers holds: keys and values, states of linear layers, and those of recurrences and convolutions."""
    held = 0
    for layer in cache.layers:
        if isinstance(layer, LinearStateLayer):
            held += layer.nbytes()
        else:
            held += sum(value.nbytes for value in vars(layer).values() if isinstance(value, Tensor))
        if isinstance(layer, LinearAttentionLayer):
            states = (*layer.conv_states.values(), *layer.recurrent_states.values())
            held += sum(state.nbytes for state in states if state is not None)
    return held


def get_layer_types_and_kwargs(config: PreTrainedConfig) -> tuple[list[str], Any]:
    """Transformers' own answer, with our types for the attention layers of a model with `attn_implementation="linattn"`.

    Raises:
        ValueError: an architecture without attention interface, with attention that is not over all keys before, or with softmax
            layers beside layers that share keys.
    """
    types, kwargs = layer_types(config)
    if config._attn_implementation == NAME:
        if not is_compiling():
            require_attention_interface(config)
        kept = softmax_layers(config)
        if kept and _shares_keys(config):
            raise ValueError(
                "Layers of this model share keys, and a softmax and a linear layer cannot: leave linattn option softmax_layers empty."
            )
        if kept and (modules := getattr(config, "num_layers_per_stack", len(types))) != len(types):
            raise ValueError(
                f"Layers of this model run several times a token, each time with another of the {len(types)} places of its cache, and "
                f"linattn option softmax_layers counts {modules} of them: leave it empty, or give use_cache=False."
            )
        types = [KEPT.get(kind, kind) if layer in kept else _our_type(kind) for layer, kind in enumerate(types)]
        form, heads = known_options(config).attention, getattr(config, "num_attention_heads", None)
        for layer_kwargs in kwargs if isinstance(kwargs, list) else [kwargs]:  # older Transformers have one for all layers
            layer_kwargs.update(form=form, query_heads=heads)
    return types, kwargs


def _shares_keys(config: Any) -> bool:
    return bool(getattr(config, "num_kv_shared_layers", 0)) or "reuse" in (getattr(config, "kv_sharing_modes", None) or ())


def _our_type(kind: str) -> str:
    """The type of our layer in place of one of Transformers; the same type where that keeps no keys."""
    if kind in OUR_TYPES:
        return OUR_TYPES[kind]
    if issubclass(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[kind], CacheLayerMixin):
        raise ValueError(
            f"Layers of type {kind!r} choose or compress the keys that they attend to, and linear attention has no keys to choose from; "
            'load the model with attn_implementation="sdpa".'
        )
    return kind


def install() -> None:
    """Makes Transformers build caches with our layers."""
    cache_utils.STATIC_LAYER_TYPE_MAPPING.update({NAME: StaticLinearStateLayer, MIXED: StaticMixedLayer})
    cache_utils.get_layer_types_and_kwargs = get_layer_types_and_kwargs
