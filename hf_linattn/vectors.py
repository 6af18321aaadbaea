"""In a step of one sequence each vector that a matrix is multiplied by is made once, and not again for each row of the matrix.

Inductor's own products of one row, which read a matrix as fast as it can be read, would make it themselves, in each of many blocks: of
TinyLlama's gate and up projection the 5,632 numbers of an activation, of a norm all but its mean.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from . import made


def make_once(graph: GraphModule) -> None:
    """Those of a graph on a GPU, for its products alone: a vector may be a view of what others write, or be written itself."""
    for product in graph.graph.find_nodes(op="call_function", target=torch._C._nn.linear):
        node = product.args[0] if product.args else product.kwargs.get("input")
        if isinstance(node, Node) and node.op != "placeholder" and node.target is not made.MADE and made.is_on_gpu(node):
            made.make_for(graph, node, product)
    graph.recompile()
