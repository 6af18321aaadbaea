"""A compiled graph as a CUDA graph of its own, for what lies where it lay when it was captured.

PyTorch's own CUDA graphs ("trees") serve any sequence of graphs, and take a slow host a quarter of a millisecond a token. A decoding step
is one graph: weights, states and learned numbers stay where they are, and a few small tensors of the token are copied in. Addresses are
compared where a text begins, with those of the captures so far. What Inductor holds to be unfit for CUDA graphs runs uncaptured.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from . import joined, sums, vectors, waves

logger = logging.get_logger(__name__)
KEPT = 4
"""Captures of one graph: for as many caches that take turns. They hold no cache, and share the memory of what lies between."""
SEARCHES_AGAIN = torch.__version__ < "2.13"
"""Whether PyTorch, of kernels that its static launcher takes from the cache on disk, forgets which blocks were found best, and searches for
them in each process anew (pytorch/pytorch#172819)."""
_running = threading.local()
"""`tensors`: by identity, those that the model's call under way was given, which are others at the next."""


class Place(NamedTuple):
    """Where a device's graphs are captured: the stream, and the memory that all of them share, for one of them runs at a time."""

    stream: torch.cuda.Stream
    pool: Any
    keeper: torch.cuda.CUDAGraph
    """An empty graph: PyTorch captures into no memory whose graphs are all gone while results of theirs are not."""


_places: dict[torch.device, Place] = {}


@contextmanager
def given(tensors: Sequence[Tensor] | None) -> Iterator[None]:
    """Says what the call of the model that follows is given; None where nothing is to be captured."""
    around = getattr(_running, "tensors", None)
    _running.tensors = None if tensors is None else {id(x) for x in tensors}
    try:
        yield
    finally:
        _running.tensors = around


def compile_graph(backend: Callable[..., Any], graph: Any, inputs: list[Any], joins: bool = False) -> Callable[..., Any]:
    """What a backend makes of a graph; captured where it would be a CUDA graph of PyTorch's. Dynamo has one thread compile at a time.

    `joins`: whether matrices of the model may be moved, see `joined`.
    """
    from torch._inductor import compile_fx, config
    from torch._inductor.utils import align_inputs_from_check_idxs
    from torch.utils._ordered_set import OrderedSet

    fit = list[bool]()

    def cudagraphify(model: Callable[..., Any], *_: Any, mutated_input_idxs: Any = (), **__: Any) -> Callable[..., Any]:
        fit.append(True)
        aligned = list[Callable[..., Any]]()

        def run(new: list[Any]) -> Any:
            if not aligned:
                check = compile_fx.get_input_idxs_to_check(new, ())
                aligned.append(align_inputs_from_check_idxs(model, check, OrderedSet(mutated_input_idxs)))
            return aligned[0](new)

        return run

    patches = {"graph_partition": False}  # so that it is asked of the whole graph
    if multiplies_one_row(graph):
        patches |= {"coordinate_descent_tuning": True, "inplace_buffers": False}  # a search times copies of what a kernel writes in place
        if SEARCHES_AGAIN:
            patches["use_static_cuda_launcher"] = False
    theirs, compile_fx.cudagraphify = compile_fx.cudagraphify, cudagraphify
    try:
        with config.patch(patches):  # what the user says in options is said after, by the backend
            made = improved(backend, graph, inputs, joins)
    finally:
        compile_fx.cudagraphify = theirs
    return Captured(made) if fit else made


def improved(backend: Callable[..., Any], graph: Any, inputs: list[Any], joins: bool) -> Callable[..., Any]:
    """Of a graph in which waves, sums and what meets a matrix with one row are made once, with joined matrices and with small kernels that
    do not wait for one another as one, which saves three a layer; each left out where a backend fails at it."""
    from torch._inductor import config

    waves.make_once(graph)
    sums.make_once(graph)
    is_one_row = multiplies_one_row(graph)
    if joins and (one := joined.join(graph, inputs, is_one_row)) is not None:
        if is_one_row:
            vectors.make_once(one.graph)
        for combo_kernels in (True, False):
            with suppress(Exception), config.patch(combo_kernels=combo_kernels):  # of whichever kind a code generator's bug is
                return one.run(backend(one.graph, one.inputs))
    if is_one_row:
        vectors.make_once(graph)
    with suppress(Exception), config.patch(combo_kernels=True):
        return backend(graph, inputs)  # type: ignore[no-any-return]
    return backend(graph, inputs)  # type: ignore[no-any-return]  # what is wrong otherwise is raised again


def multiplies_one_row(graph: torch.fx.GraphModule) -> bool:
    """Whether its matrices meet vectors: a token of one sequence. A library's product then takes twice the time that reading the matrix
    does; Inductor's own, which it makes only where it may search for their best shape of blocks, comes near it. Sizes that no one knows
    yet, as of the tokens that an expert is given, are not asked for."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    linear = [node.meta["example_value"] for node in graph.graph.nodes if node.target is torch._C._nn.linear]
    return bool(linear) and all(statically_known_true(x.numel() == x.shape[-1]) for x in linear)


class Capture(NamedTuple):
    """A CUDA graph, and what it was captured with."""

    graph: Any
    seen: tuple[Any, ...]
    moving: list[int]
    buffers: list[Tensor]
    results: list[Any]

    def run(self, *now: Any) -> list[Any]:
        """Results in the graph's own memory, which the next run writes."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, [now[place] for place in self.moving])
        self.graph.replay()
        return self.results


class Captured:
    """A graph that is captured at the second of two calls whose tensors, those of the token apart, lie in the same places."""

    def __init__(self, graph: Callable[..., Any]) -> None:
        self.graph = graph
        self.kept: list[Capture] = []
        self.recent: list[tuple[Any, ...]] = []  # what calls that were not captured were given
        self.refused = False
        self.again: Callable[..., Any] | None = None
        """Does what the last call did, with tensors where they were then; None where that is to be captured yet."""

    def __call__(self, *now: Any) -> Any:
        moving = _places_of(getattr(_running, "tensors", None), now)
        seen = None if self.refused or moving is None else _seen(now, moving)
        if seen is None or moving is None:
            self.again = self.graph
            return self.graph(*now)
        capture = next((capture for capture in self.kept if capture.seen == seen), None)
        if capture is not None:
            self.again = capture.run
            return capture.run(*now)
        if seen in self.recent:
            return self._first(self._capture(now, moving, seen), now)
        self.recent, self.again = [seen, *self.recent[: KEPT - 1]], None
        return self.graph(*now)

    def forget(self) -> None:
        """Lets go of all captures."""
        self.kept.clear()
        self.again = None

    def _first(self, capture: Capture | None, now: Sequence[Any]) -> Any:
        if capture is None:
            self.refused, self.again = True, self.graph
            return self.graph(*now)
        results = capture.run(*now)
        sources = [now[place] for place in capture.moving]
        if all(map(torch.equal, capture.buffers, sources)):
            self.kept[:], self.again = [capture, *self.kept[: KEPT - 1]], capture.run
        else:  # the graph writes what it is given
            self.refused, self.again = True, self.graph
            torch._foreach_copy_(sources, capture.buffers)
        return results

    def _capture(self, now: Sequence[Any], moving: list[int], seen: tuple[Any, ...]) -> Capture | None:
        sources = [now[place] for place in moving]
        with torch.inference_mode(False), torch.no_grad():
            buffers = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for x in sources]
        inputs = list(now)
        for place, x in zip(moving, buffers, strict=True):
            inputs[place] = x
        try:
            graph, results = record(self.graph, inputs, the_gpu(now))
        except RuntimeError as error:
            logger.warning_once(f"A compiled step runs without a CUDA graph, which could not be captured: {error.__context__ or error}")
            return None
        return Capture(graph, seen, moving, buffers, list(results))


def _place_on(device: torch.device) -> Place:
    place = Place(torch.cuda.Stream(device), torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph())
    place.stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(place.stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is meant to be empty
        place.keeper.capture_begin(pool=place.pool, capture_error_mode="thread_local")
        place.keeper.capture_end()
    return place


def record(graph: Callable[..., Any], inputs: list[Any], device: torch.device) -> tuple[Any, Any]:
    """A CUDA graph of what `graph` does with these inputs, none of which it does now, and where it leaves the results."""
    if device not in _places:
        _places[device] = _place_on(device)
    stream, pool, _ = _places[device]
    made = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            made.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                results = graph(*inputs)
            finally:
                made.capture_end()
    except RuntimeError:
        del _places[device]
        with suppress(RuntimeError):  # what ending the capture would have done, had it not failed
            torch._C._cuda_endAllocateToPool(device.index, pool)
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())  # the one that was being captured cannot be drawn from any more
        raise
    torch.cuda.current_stream(device).wait_stream(stream)
    return made, results


def _places_of(tensors: set[int] | None, now: Sequence[Any]) -> list[int] | None:
    return None if tensors is None else [place for place, x in enumerate(now) if isinstance(x, Tensor) and id(x) in tensors]


def the_gpu(now: Sequence[Any]) -> Any:
    """The GPU that all tensors are on; None where there is not one, or another graph is being captured there."""
    devices = {x.device for x in now if isinstance(x, Tensor)}
    device = devices.pop() if len(devices) == 1 else None
    return None if device is None or device.type != "cuda" or torch.cuda.is_current_stream_capturing() else device


def _seen(now: Sequence[Any], moving: list[int]) -> tuple[Any, ...] | None:
    """What must be as it was for a capture to serve; None where nothing can be captured."""
    if the_gpu(now) is None or any(torch._debug_has_internal_overlap(now[place]) for place in moving):
        return None
    places = set(moving)
    return tuple(
        (x.shape, x.stride(), None if place in places else x.data_ptr()) if isinstance(x, Tensor) else x for place, x in enumerate(now)
    )
