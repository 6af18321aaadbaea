"""What a compiled step makes of learned numbers alone, taken out of its graph and made once a text.

A layer learns a few numbers a head, and a dozen small operations bring them inside their bounds. Of each token they would be one to four
kernels a layer, as long on a GPU as a small model's attention. Taken out, they enter the graph as what they come to, at fixed addresses.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

from .config import NAME
from .forms import kept

_FUNCTIONS = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.getitem, torch.sigmoid, torch.exp, torch.tanh),
    *(torch.full_like, torch.ones_like, torch.zeros_like, torch.stack, torch.cat, torch.add, torch.mul, torch.neg, F.softplus),
}
_METHODS = {"float", "to", "double", "expand", "view", "reshape", "unsqueeze", "flatten", "contiguous", "exp", "sigmoid", "neg", "mul"}
LARGEST = 2**16
"""Numbers in one tensor that is kept beside the model."""


class LearnedPart:
    """A graph's operations on learned numbers alone, which are taken out of it: it is given their `values` behind its own inputs."""

    def __init__(self, module: fx.GraphModule, inputs: list[Any]) -> None:
        self.values: tuple[Tensor, ...] = ()
        self.tensors: list[Tensor] = []
        self.is_counted = True
        self.written: Any = None
        self.part: fx.GraphModule | None = None
        self.rest = module
        """The graph of what is left, which has further inputs."""
        nodes = _of_learned_numbers(module.graph)
        given = list(module.graph.find_nodes(op="placeholder"))
        ends = [node for node in nodes if node.op != "placeholder" and node.target is not torch.full and _is_used_outside(node, nodes)]
        if not ends:
            return
        self.places = [place for place, node in enumerate(given) if node in nodes]
        self.part = _alone(module, [given[place] for place in self.places], nodes, ends)
        self.make(inputs)
        _say_sizes_stay(self.values)
        self.rest = _without(module, nodes, ends)

    def make(self, inputs: Any) -> None:
        """Makes the values anew, in the memory that they have."""
        if self.part is None:
            return
        self.tensors = [inputs[place] for place in self.places]
        self.is_counted = not any(x.is_inference() for x in self.tensors)
        self.written = self._versions()
        with torch.inference_mode(False), torch.no_grad():
            made = self.part(*self.tensors)
            if not self.values:
                self.values = tuple(x.clone(memory_format=torch.contiguous_format) for x in made)
            else:
                torch._foreach_copy_(list(self.values), list(made))

    def is_written(self) -> bool:
        """Whether someone has written a learned number in place since, as far as PyTorch counts it, or may have."""
        return not self.is_counted or self.written != self._versions()

    def _versions(self) -> Any:
        return kept.optimizer_steps(), [x._version for x in self.tensors] if self.is_counted else None


def _say_sizes_stay(values: tuple[Tensor, ...]) -> None:
    """To the trace under way, which would give a symbol to each size of a tensor that it has not met, and guards that it cannot name."""
    context = TracingContext.try_get()
    for number, value in enumerate(values if context is not None else ()):
        sizes, source = [DimDynamic.STATIC] * value.dim(), ConstantSource(f"learned_{number}")
        context.tensor_to_context[value] = StatefulSymbolicContext(  # type: ignore[union-attr]
            dynamic_sizes=sizes, tensor_source=source, shape_env_to_source_to_symbol_cache={}
        )


def _of_learned_numbers(graph: fx.Graph) -> dict[fx.Node, None]:
    """The learned numbers that a graph is given, what is made of them alone, and the constants that this takes."""
    found, constants = dict[fx.Node, None](), dict[fx.Node, list[fx.Node]]()
    for node in graph.nodes:
        made_of = node.all_input_nodes
        if node.op == "placeholder":
            if _is_learned(node):
                found[node] = None
        elif node.target is torch.full and not made_of:
            constants[node] = [node]
        elif not _is_pure(node) or not made_of or any(x not in found and x not in constants for x in made_of):
            continue
        elif all(x in constants for x in made_of):
            constants[node] = [*(part for x in made_of for part in constants[x]), node]
        elif _is_small(node) and not any(user.op == "output" for user in node.users):
            found |= dict.fromkeys([*(part for x in made_of for part in constants.get(x, ())), node])
    return found


def _is_pure(node: fx.Node) -> bool:
    return (node.op == "call_function" and node.target in _FUNCTIONS) or (node.op == "call_method" and node.target in _METHODS)


def _is_used_outside(node: fx.Node, nodes: dict[fx.Node, None]) -> bool:
    return any(user not in nodes for user in node.users)


def _is_learned(node: fx.Node) -> bool:
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return False
    name = source.name if isinstance(source.name, str) else source.name()
    return f"['{NAME}']" in name and _is_small(node)


def _is_small(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and all(isinstance(size, int) for size in value.shape) and value.numel() <= LARGEST


def _alone(graph: fx.GraphModule, given: list[fx.Node], nodes: dict[fx.Node, None], ends: list[fx.Node]) -> fx.GraphModule:
    part = fx.Graph()
    copies = {node: part.placeholder(node.name) for node in given}
    for node in nodes:
        if node.op != "placeholder":
            copies[node] = part.node_copy(node, lambda x: copies[x])
    part.output(tuple(copies[node] for node in ends))
    return fx.GraphModule(graph, part)


def _without(module: fx.GraphModule, nodes: dict[fx.Node, None], ends: list[fx.Node]) -> fx.GraphModule:
    """A copy, for PyTorch goes on with its own, with an input in the place of each of `ends`."""
    rest, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.find_nodes(op="placeholder"):
        copies[node] = rest.node_copy(node)
        copies[node]._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    for number, node in enumerate(ends):
        copies[node] = entering = rest.placeholder(f"learned_{number}")
        # at a fixed address, as CUDA graphs are told
        entering.meta = {"example_value": node.meta["example_value"], "tensor_dict": {"_dynamo_static_input_type": "unguarded"}}
        entering._dynamo_source = None  # type: ignore[attr-defined]
    for node in module.graph.nodes:
        if node not in copies and (node not in nodes or _is_used_outside(node, nodes)):
            copies[node] = rest.node_copy(node, lambda x: copies[x])
    made = fx.GraphModule(module, rest)
    made.meta = dict(module.meta)
    for name, value in vars(module).items():
        made.__dict__.setdefault(name, value)
    return made
