"""Cosines and sines of positions are made once in a compiled step's graph, as the model says, and not again in each layer for each head.

Inductor makes again whatever is quick to make, in every kernel that asks for it. Of large angles a GPU takes long: at 262,144 tokens the
small kernels that turn queries and keys, two a layer, took twice as long as at 1,024, a twentieth of a token's time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

WAVES = ("cos", "sin", torch.cos, torch.sin)
_library = torch.library.Library("linattn", "FRAGMENT")
_library.define("made(Tensor x) -> Tensor")
_library.impl("made", lambda x: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("linattn::made", torch.empty_like)


def make_once(graph: GraphModule) -> None:
    """Puts an operator that Inductor cannot look through, `linattn::made`, behind the waves of a graph on a GPU."""
    for node in list(graph.graph.nodes):
        if node.target in WAVES and _is_on_gpu(node):
            last = _before_it_is_shared(node)
            with graph.graph.inserting_after(last):
                made = graph.graph.call_function(torch.ops.linattn.made.default, (last,))
            last.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)  # type: ignore[misc]
    graph.recompile()


def _before_it_is_shared(node: Node) -> Node:
    """The last of what one follows from another alone: scaled, and in the model's dtype."""
    while len(node.users) == 1:
        (user,) = node.users
        if not isinstance(_value(user), Tensor) or user.all_input_nodes != [node]:
            break
        node = user
    return node


def _value(node: Node) -> Any:
    return node.meta.get("example_value")


def _is_on_gpu(node: Node) -> bool:
    value = _value(node)
    return isinstance(value, Tensor) and value.is_cuda
