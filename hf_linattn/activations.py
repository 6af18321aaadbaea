"""What a matrix is multiplied by in a step of one sequence is made once where it takes an activation, and not for each row of the matrix.

Inductor's own products of one row, which read a matrix as fast as it can be read, would make it themselves: of TinyLlama's gate and up
projection 5,632 numbers in each of many blocks, which took longer than a kernel for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from . import made

ACTIVATIONS = (F.silu, F.gelu, F.mish, F.softplus, torch._C._nn.gelu, torch.sigmoid, torch.tanh, torch.exp, "sigmoid", "tanh", "exp")


def make_once(graph: GraphModule) -> None:
    """Those of a graph on a GPU."""
    products = graph.graph.find_nodes(op="call_function", target=torch._C._nn.linear)
    vectors = dict.fromkeys(node.args[0] if node.args else node.kwargs.get("input") for node in products)
    for node in vectors:
        if isinstance(node, Node) and made.is_on_gpu(node) and any(part.target in ACTIVATIONS for part in (node, *node.all_input_nodes)):
            made.make_once(graph, node)
    graph.recompile()
