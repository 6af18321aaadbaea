"""Matrices that a compiled step multiplies the same vectors by lie one behind the other in memory, and it reads them as one.

A product of few rows takes a GPU as long as its matrix takes to be read, but never less than five microseconds: of keys and values, 256
rows each in TinyLlama, cuBLAS could read twenty times as much meanwhile. So queries', keys' and values' matrices are one, and those of
gate and up projection. Parameters stay what they are, views of one memory from then on, which takes no more of it. They are left where
they are if anything else may know where that is: views, memory that more than a parameter holds, and what another thread generates with.
Where one of them lies elsewhere later all are moved again, or, if they may not be, copied at each call.

Of one sequence gate and up projection are left apart: a code generator, which makes these products itself, makes both and what combines
them in one kernel, where what combines the halves of a product is a kernel of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .texts import others_generate

DEVICES = ("cuda",)
_LINEAR = torch._C._nn.linear
_BY_ELEMENT = (F.silu, F.gelu, F.relu, torch._C._nn.gelu, torch.sigmoid, torch.tanh, operator.mul, operator.add, "mul", "add")
"""What does not ask how its arguments' rows follow one another."""
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}


class Joined(NamedTuple):
    """A graph that reads matrices as one, its inputs, and the places of the former inputs that each of these was."""

    graph: GraphModule
    inputs: list[Any]
    places: list[list[int]]

    def run(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """What takes the inputs that the graph had before."""

        of_inputs = self.places  # not the inputs, which would live as long as what PyTorch compiled

        def run(*given: Any) -> Any:
            parts = ([given[place] for place in places] for places in of_inputs)
            return compiled(*(some[0] if len(some) == 1 else as_one(some) for some in parts))

        return run


def join(graph: GraphModule, inputs: Sequence[Any], is_one_row: bool = False) -> Joined | None:
    """Moves parameters; None where there is nothing to be moved. `is_one_row`: matrices meet vectors."""
    changed = _copy(graph)
    nodes = changed.graph.find_nodes(op="placeholder")
    places = {node: [place] for place, node in enumerate(nodes)}
    of_place = dict(zip(nodes, inputs, strict=True))
    for products in _that_share(changed, of_place):
        if is_one_row and _meet_by_element(products):
            continue
        operands = [[node.args[number] for node in products] for number in (1, 2) if products[0].args[number] is not None]
        if all(_move_together([of_place[node] for node in some]) for some in operands):
            _multiply_once(changed, products)
            for first, *others in operands:
                of_place[first] = _told(as_one([of_place[node] for node in (first, *others)]))
                places[first] += [place for node in others for place in places.pop(node)]
                for node in others:
                    changed.graph.erase_node(node)
    if len(places) == len(nodes):
        return None
    torch.cuda.empty_cache()  # where the matrices were, which is too small for others that are joined
    changed.recompile()
    return Joined(changed, [of_place[node] for node in places], list(places.values()))


def _copy(graph: GraphModule) -> GraphModule:
    """With what Dynamo says of its inputs."""
    nodes, known = Graph(), dict[Node, Node]()
    out: Any = nodes.graph_copy(graph.graph, known, return_output_node=True)
    nodes.output(out[0]).meta.update(out[1].meta)
    for node in graph.graph.find_nodes(op="placeholder"):
        known[node].meta.pop("grapharg", None)  # a reference to a parameter, which nobody could swap then; Dynamo drops its own at the end
        if hasattr(node, "_dynamo_source"):
            known[node]._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    changed = GraphModule(graph, nodes)
    changed.meta.update(graph.meta)
    return changed


def _told(x: Tensor) -> Tensor:
    """A tensor of which PyTorch knows, where it is compiling, that its sizes do not vary."""
    context = torch._guards.TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        context.fake_mode.from_tensor(x, static_shapes=True)
    return x


def as_one(parts: Sequence[Tensor]) -> Tensor:
    """Matrices (N, K), or vectors (N,), one behind the other, (sum of N, ...): in their memory where they lie so, or can be moved so."""
    if not _move_together(parts):
        return torch.cat([part.detach() for part in parts])
    first = parts[0].detach()
    return first.as_strided((sum(part.shape[0] for part in parts), *first.shape[1:]), first.stride(), first.storage_offset())


def _that_share(graph: GraphModule, of_place: dict[Any, Any]) -> list[list[Any]]:
    """Products whose vectors are the same, two and more of one kind."""

    def kind(node: Any) -> tuple[int, bool]:
        return order[node.args[0]], node.args[2] is None

    products: list[Any] = [
        node for node in graph.graph.find_nodes(op="call_function", target=_LINEAR) if len(node.args) == 3 and not node.kwargs
    ]
    order = {node: number for number, node in enumerate(graph.graph.nodes)}
    products = [node for node in products if all(x is None or _is_a_products(x, of_place) for x in node.args[1:])]
    kinds = (list(some) for _, some in groupby(sorted(products, key=kind), key=kind))
    return [some for some in kinds if len(some) > 1 and not any(map(_writes, some[0].args[0].users))]


def _meet_by_element(products: list[Any]) -> bool:
    """Whether they are of one size, and what follows from each by element is combined by element."""
    behind = {_behind(node) for node in products}
    return len({_value(node).shape for node in products}) == 1 and len(behind) == 1 and None not in behind


def _behind(node: Any) -> Any:
    """What takes others as well as what follows from a product by element; None where something else takes it before."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target not in _BY_ELEMENT or user.all_input_nodes != [node]:
            return user if user.target in _BY_ELEMENT else None
        node = user
    return None


def _is_a_products(node: Any, of_place: dict[Any, Any]) -> bool:
    """Whether it is a parameter that one product reads, and nothing else."""
    return type(of_place.get(node)) is nn.Parameter and len(node.users) == 1


def _writes(user: Any) -> bool:
    """Whether it may write into what it is given, between two products of that."""
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    return name.endswith("_") or getattr(operator, name, None) in _IN_PLACE or "out" in user.kwargs or bool(user.kwargs.get("inplace"))


def _lie_together(parts: Sequence[Tensor]) -> bool:
    first, are_whole = parts[0], all(part.is_contiguous() and part.dtype == parts[0].dtype for part in parts)
    if not are_whole or any(a.data_ptr() + a.nbytes != b.data_ptr() for a, b in pairwise(parts)):
        return False
    return first.storage_offset() * first.itemsize + sum(part.nbytes for part in parts) <= first.untyped_storage().nbytes()


def _move_together(parts: Sequence[Any]) -> bool:
    """Whether they lie together now."""
    if _lie_together(parts):
        return True
    if len({id(part) for part in parts}) < len(parts) or len({part.dtype for part in parts}) > 1 or not all(map(_may_move, parts)):
        return False
    before = [part.data for part in parts]
    try:
        with torch.inference_mode(False), torch.no_grad():
            moved = torch.cat(before).split([part.shape[0] for part in parts])
    except torch.OutOfMemoryError:
        return False
    for part, there in zip(parts, moved, strict=True):
        part.data = there
    if parts[0].is_cuda:
        torch.cuda.synchronize(parts[0].device)  # what still reads where they were, in whichever stream, has done so
    del before
    return True


def _may_move(x: Tensor) -> bool:
    """Whether it is a parameter whose memory nobody else holds, or would miss where it is."""
    if type(x) is not nn.Parameter or x.device.type not in DEVICES or x.is_inference() or not x.is_contiguous() or x.nbytes % 16:
        return False
    storage = x.untyped_storage()
    is_its_own = storage.nbytes() == x.nbytes and torch._C._storage_Use_Count(storage._cdata) <= 2  # the parameter's, and this one
    is_read = others_generate() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    return is_its_own and not is_read


def _multiply_once(graph: GraphModule, products: list[Any]) -> None:
    """One product in the place of several, whose matrices the first one's operands hold now."""
    first, values = products[0], [_value(node) for node in products]
    sizes = [value.shape[-1] for value in values]
    with graph.graph.inserting_before(first):
        product = graph.graph.call_function(_LINEAR, first.args)
        product.meta["example_value"] = values[0].new_empty((*values[0].shape[:-1], sum(sizes)))
        parts = graph.graph.call_method("split", (product, sizes, -1))
        for place, (node, cut) in enumerate(zip(products, _value(product).split(sizes, -1), strict=True)):
            part = graph.graph.call_function(operator.getitem, (parts, place))
            if not all(_takes_any_rows(user, cut) for user in node.users):
                part = graph.graph.call_method("contiguous", (part,))
            part.meta["example_value"] = values[place]
            node.replace_all_uses_with(part)
    for node in products:
        graph.graph.erase_node(node)


def _takes_any_rows(user: Any, cut: Tensor) -> bool:
    """Whether a row may be followed by what is not of the same product: where it is by element, or heads, which then change places."""
    if user.target in _BY_ELEMENT:
        return True
    if user.target != "view" or any(of_heads.target != "transpose" for of_heads in user.users):
        return False
    try:
        cut.view(_value(user).shape)
    except RuntimeError:
        return False
    return True


def _value(node: Any) -> Any:
    return node.meta["example_value"]
