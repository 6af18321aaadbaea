"""Sums of the residual stream are made once in a compiled step's graph, so that kernels of one layer are those of all.

Inductor adds again wherever a sum is read, since that is quick: a norm then adds up what several layers gave before it, and no two of them
are the same kernel. Each was to be compiled, and of one sequence searched for its best blocks, by itself.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from . import made

SUMS = (operator.add, torch.add, "add")


def make_once(graph: GraphModule) -> None:
    """Those of a graph on a GPU that follow from a product and are read more than once."""
    follow = set[Node]()
    for node in list(graph.graph.nodes):
        if node.target is torch._C._nn.linear or not follow.isdisjoint(node.all_input_nodes):
            follow.add(node)
            if node.target in SUMS and "out" not in node.kwargs and len(node.users) > 1 and made.is_on_gpu(node):
                made.make_once(graph, node)
                follow.update(node.users)
    graph.recompile()
