"""The compiled step of `generate(..., cache_implementation="static")`, looked through where a text begins and not at each of its tokens.

`torch.compile` guards all that it read while it traced: of a model of 22 layers some thousand attributes, asked again at every call, before
the same attributes are read again for the graph's inputs. Within a text they stay as they are, and checking takes longer than the device
needs for the token. So a text's first tokens go the whole way, through all guards. Once such a call compiled nothing, ran one graph, and
left the cache's Python values and tensors where they were, the tokens that follow call that graph directly: with the tensors it was called
with, and in place of the inputs of the token before those of this one. What is changed on the model between two texts is seen by the
guards of the second. What a callback writes into its tensors meanwhile is seen at once, anything else by the next text.

CUDA graphs have one memory for every call and thread. So threads take turns at a device, a call at a time, and what a call returns is a
copy, which the next one leaves as it is.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils import _pytree as pytree
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from . import captured
from .forms.parameters import hand_on_what_enters
from .mask import TOLD

_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)
_KNOWN = {"torch", "transformers", "peft", "hf_linattn"}
_running = threading.local()
"""`calls`: where the graphs that run in this thread are noted, if anywhere."""
_made = 0


class Ran(NamedTuple):
    """One call of a compiled graph."""

    graph: Callable[..., Any]
    inputs: tuple[Any, ...]
    results: tuple[Any, ...]
    again: Callable[..., Any] | None
    """Does the same with what lies in the same places; None where that is not settled yet."""


class Watched:
    """A backend of torch.compile that does what another one does, counts what it compiles, and notes what it runs."""

    def __init__(self, backend: Callable[..., Any]) -> None:
        self.backend, self.compiled, self.joins = backend, 0, False
        self.captured: list[captured.Captured] = []
        self.__name__ = getattr(backend, "compiler_name", type(self).__name__)  # after its own PyTorch drops what forbids `swap_tensors`

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compiled += 1
        if torch.is_grad_enabled():
            return self.backend(graph, inputs)  # type: ignore[no-any-return]
        made = captured.compile_graph(self.backend, graph, inputs, self.joins)
        if isinstance(made, captured.Captured):
            self.captured.append(made)

        def run(*given: Any) -> Any:
            results = copies(made(*given))
            if (calls := getattr(_running, "calls", None)) is not None:
                calls.append(Ran(made, given, tuple(results), made.again if isinstance(made, captured.Captured) else made))
            return results

        return run

    def forget(self) -> None:
        """Lets go of what was captured: PyTorch keeps what it compiled, and so what we gave it, after a model is gone."""
        for one in self.captured:
            one.forget()

    def reset(self) -> None:
        if hasattr(self.backend, "reset"):
            self.backend.reset()


def copies(results: Iterable[Any]) -> list[Any]:
    return [x.clone() if isinstance(x, Tensor) else x for x in results]


class _Turns:
    """At one device: the thread that runs a compiled step, and the stream that the last one ran in."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a hook may generate by itself
        self.stream: torch.cuda.Stream | None = None

    @contextmanager
    def one(self, device: torch.device) -> Iterator[None]:
        with self.lock:
            if device.type == "cuda":
                stream = torch.cuda.current_stream(device)
                if self.stream is not None and self.stream != stream:
                    stream.wait_stream(self.stream)
                self.stream = stream
            yield


_turns: dict[torch.device, _Turns] = {}


class CompiledStep:
    """A model's compiled call, with code of its own: PyTorch keeps what it compiled beside the code, for all models that run it."""

    def __init__(self, model: PreTrainedModel, config: Any) -> None:
        self.model, self.config = model, config

        def step(**inputs: Any) -> Any:
            return model(**inputs)

        step.__code__ = _own_code(step.__code__)
        options = config.to_dict()
        self.watched = _watched(options)
        if self.watched is not None:
            given = options.pop("options", None) or {}
            filtered = {name: given[name] for name in ("guard_filter_fn",) if name in given}
            options |= {"backend": self.watched, "mode": None, "options": filtered or None}
            weakref.finalize(self, self.watched.forget).atexit = False
        self.call = torch.compile(step, **options)
        self.hooks = list(_all_hooks(model))

    def serves(self, model: PreTrainedModel, config: Any) -> bool:
        """Whether it is this model's, compiled as this configuration says. PyTorch's guards leave out hooks."""
        if model is not self.model or config != self.config:
            return False
        hooks = list(_all_hooks(model))
        return len(hooks) == len(self.hooks) and all(map(operator.is_, hooks, self.hooks))

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the model compiles for itself."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    def text(self) -> Callable[..., Any]:
        """What a text's tokens are given to."""
        if self.watched is not None:
            self.watched.joins = only_reads(self.model)  # others may bring weights of their own, or write between two products
        return Text(self.model, self.call, self.watched if self.only_computes() else None)

    def only_computes(self) -> bool:
        return all(map(_is_known, self.hooks))


def _own_code(code: CodeType) -> CodeType:
    global _made
    _made += 1
    return code.replace(co_name=f"{code.co_name}_{_made}")  # also by name, for sizes that were seen to vary are remembered by it


def _watched(options: dict[str, Any]) -> Watched | None:
    """The backend that torch.compile would make of its arguments, watched; None where it would be of another kind."""
    backend, mode, dynamic = (options[name] for name in ("backend", "mode", "dynamic"))
    given = {name: value for name, value in (options["options"] or {}).items() if name != "guard_filter_fn"} or None
    if (mode is not None and options["options"] is not None) or "use_aoti" in (given or {}):
        return None  # refused, or served, by torch.compile itself
    if backend == "inductor":
        return Watched(torch._TorchCompileInductorWrapper(mode or (None if given else "default"), given, dynamic))
    return Watched(torch._TorchCompileWrapper(backend, mode, given, dynamic))


def _all_hooks(model: nn.Module) -> Iterator[Any]:
    """What is called around modules, and in the place of what their class says."""
    yield from nn_module._global_forward_hooks.values()
    yield from nn_module._global_forward_pre_hooks.values()
    for module in model.modules():
        yield from module._forward_hooks.values()
        yield from module._forward_pre_hooks.values()
        if "forward" in module.__dict__:
            yield module.__dict__["forward"]


def only_computes(model: nn.Module) -> bool:
    """Whether no hook of a model does anything that is not in what it returns."""
    return all(map(_is_known, _all_hooks(model)))


def only_reads(model: nn.Module) -> bool:
    """Whether nothing of the user's own is in a model, which might write into what it is given: no hook, no module."""
    return only_computes(model) and all(type(module).__module__.partition(".")[0] in _KNOWN for module in model.modules())


def _is_known(hook: Any) -> bool:
    """Whether a hook only computes, so that nothing is left out: ours, and those by which Transformers collects what it is to return."""
    return hook is hand_on_what_enters or getattr(hook, "__module__", "").startswith("transformers.")


class Text:
    """The calls of one text, all of them through the guards where they are not `watched`."""

    def __init__(self, model: PreTrainedModel, call: Callable[..., Any], watched: Watched | None) -> None:
        self.model, self.call, self.watched = model, call, watched
        self.device = model.device
        self.turns = _turns.setdefault(self.device, _Turns())
        self.before: tuple[Inputs, Ran] | None = None  # the last call that went the whole way
        self.direct: Direct | None = None

    def __call__(self, **inputs: Any) -> Any:
        given = Inputs.of(inputs, self.model.training)
        with self.turns.one(self.device):
            return self._watch(inputs, given)[0] if self.watched is None else self._step(inputs, given, self.watched)

    def _step(self, inputs: dict[str, Any], given: Inputs, watched: Watched) -> Any:
        if self.direct is not None and given.are_like(self.direct.inputs):
            return self.direct.run(given)
        self.direct = None
        cache, compiled = _state(given.others), watched.compiled
        out, calls = self._watch(inputs, given)
        if len(calls) == 1 and watched.compiled == compiled and _state(given.others) == cache:
            now = (given, calls[0]._replace(results=()))
            self.direct = None if self.before is None else Direct.of(self.before, (given, calls[0]), out)
            self.before = now
        else:
            self.before = None
        return out

    def _watch(self, inputs: dict[str, Any], given: Inputs) -> tuple[Any, list[Ran]]:
        around, calls = getattr(_running, "calls", None), list[Ran]()
        _running.calls = calls
        try:
            with captured.given(None if self.model.training else given.tensors):  # in training numbers are drawn
                return self.call(**inputs), calls
        finally:
            _running.calls = around


class Inputs(NamedTuple):
    """What a call is given: tensors, what else there is, and what holds for all of PyTorch meanwhile."""

    names: tuple[str, ...]
    tensors: list[Tensor]
    others: list[Any]
    ambient: tuple[Any, ...]

    @staticmethod
    def of(inputs: dict[str, Any], training: bool) -> Inputs:
        names, tensors, others = list[str](), list[Tensor](), list[Any]()
        for name, value in _flat(inputs):
            names.append(name)
            (tensors if isinstance(value, Tensor) else others).append(value)
            if (told := getattr(value, TOLD, None)) is not None:
                names.append(TOLD)
                tensors.append(told)
        return Inputs(tuple(names), tensors, others, (training, *_ambient()))

    def are_like(self, other: Inputs) -> bool:
        """Whether a graph that was traced for the one is right for the other."""
        if self.names != other.names or self.ambient != other.ambient or len(self.tensors) != len(other.tensors):
            return False
        if any(
            a is not b and not (type(a) is type(b) and isinstance(a, _SIMPLE) and a == b)
            for a, b in zip(self.others, other.others, strict=True)
        ):
            return False
        return all(_kind(a) == _kind(b) for a, b in zip(self.tensors, other.tensors, strict=True))


class Direct(NamedTuple):
    """A graph that is called without a look at its model."""

    graph: Callable[..., Any]
    inputs: Inputs
    given: tuple[Any, ...]
    moving: list[tuple[int, int]]  # places among those given, and among the tensors of the call that they are
    results: list[Any]  # leaves of what the call returns: a place among the graph's results as an Index, or what it is itself
    shape: Any
    memory: list[Any]  # alive, so that nothing else comes to lie where the graph reads

    @staticmethod
    def of(before: tuple[Inputs, Ran], now: tuple[Inputs, Ran], out: Any) -> Direct | None:
        """By two calls one after another; None where it is not seen what of the first is another in the second."""
        (old_inputs, old), (inputs, ran) = before, now
        if ran.again is None or old.graph is not ran.graph or len(old.inputs) != len(ran.inputs) or not inputs.are_like(old_inputs):
            return None
        places, moving = {id(x): place for place, x in enumerate(inputs.tensors)}, []
        for number, (x, was) in enumerate(zip(ran.inputs, old.inputs, strict=True)):
            place = places.get(id(x))
            if place is not None and was is old_inputs.tensors[place]:
                moving.append((number, place))
            elif x is not was and not (isinstance(x, int) and x == was):
                return None
        found, leaves = {id(x): Index(place) for place, x in enumerate(ran.results)}, []
        values, shape = pytree.tree_flatten(out)
        for value in values:
            if isinstance(value, Tensor) and id(value) not in found:
                return None
            leaves.append(found.pop(id(value)) if isinstance(value, Tensor) else value)
        if found:  # a result that is not returned is kept somewhere
            return None
        memory = [x.untyped_storage() for x in ran.inputs if isinstance(x, Tensor)]
        return Direct(ran.again, inputs, ran.inputs, moving, leaves, shape, memory)

    def run(self, inputs: Inputs) -> Any:
        given = list(self.given)
        for number, place in self.moving:
            given[number] = inputs.tensors[place]
        torch._dynamo.GenerationTracker.generation += 1  # as every call of torch.compile's does: CUDA graphs know by it that a step begins
        results = copies(self.graph(*given))
        return pytree.tree_unflatten([results[x.place] if isinstance(x, Index) else x for x in self.results], self.shape)


class Index(NamedTuple):
    """A place among results."""

    place: int


def _flat(inputs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in inputs.items():
        if isinstance(value, dict):  # masks by the kind of layer
            yield from ((f"{name}.{key}", part) for key, part in value.items())
        else:
            yield name, value


def _kind(x: Tensor) -> tuple[Any, ...]:
    return type(x), x.dtype, x.device, x.shape, x.stride(), x.requires_grad


def _ambient() -> tuple[Any, ...]:
    modes = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._is_any_autocast_enabled(), *modes


def _state(value: Any) -> Any:
    """Of a cache, and of what else a call is given, all that is not in the memory of tensors."""
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, list | tuple):
        return [_state(part) for part in value]
    if isinstance(value, dict):
        return [(key, _state(part)) for key, part in value.items()]
    if isinstance(value, Cache | CacheLayerMixin):
        return id(value), _state(vars(value))
    return id(value)
