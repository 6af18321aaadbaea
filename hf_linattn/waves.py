"""Cosines and sines of positions are made once in a compiled step's graph, as the model says, and not again in each layer for each head.

Of large angles a GPU takes long: at 262,144 tokens the small kernels that turn queries and keys, two a layer, took twice as long as at
1,024, a twentieth of a token's time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import made

WAVES = ("cos", "sin", torch.cos, torch.sin)


def make_once(graph: GraphModule) -> None:
    """Those of a graph on a GPU."""
    for node in list(graph.graph.nodes):
        if node.target in WAVES and "out" not in node.kwargs and made.is_on_gpu(node):
            made.make_once(graph, _before_it_is_shared(node))
    graph.recompile()


def _before_it_is_shared(node: Node) -> Node:
    """The last of what one follows from another alone: scaled, and in the model's dtype."""
    while len(node.users) == 1:
        (user,) = node.users
        if not isinstance(made.value_of(user), Tensor) or user.all_input_nodes != [node]:
            break
        node = user
    return node
