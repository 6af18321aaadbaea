"""An operator that Inductor does not look through, `linattn::made`: what it is given is made once, and lies in memory from then on.

Inductor makes again whatever is quick to make, in every kernel that asks for it.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_CODE = "as_" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
"""The operator's overload. What Inductor made of a graph it finds again on disk by the names in it, also where other code made it, of an
older version of this file; so the name is another where the file is."""
_library = torch.library.Library("linattn", "FRAGMENT")
_library.define(f"made.{_CODE}(Tensor x) -> Tensor")
_library.impl(f"made.{_CODE}", lambda x: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake(f"linattn::made.{_CODE}", torch.empty_like)
MADE = getattr(torch.ops.linattn.made, _CODE)


def make_once(graph: GraphModule, node: Node) -> None:
    """Puts the operator behind a node, for all that use it."""
    with graph.graph.inserting_after(node):
        made = _made(graph, node)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)  # type: ignore[misc]


def make_for(graph: GraphModule, node: Node, user: Node) -> None:
    """Puts the operator between a node and one of those that use it."""
    with graph.graph.inserting_before(user):
        user.replace_input_with(node, _made(graph, node))


def _made(graph: GraphModule, node: Node) -> Node:
    _tell_inductor()
    made = graph.graph.call_function(MADE, (node,))
    made.meta["example_value"] = value_of(node)
    return made


@functools.cache
def _tell_inductor() -> None:
    """That nothing is to be copied, but what the graph was given: it may be written later on."""
    from torch._inductor import lowering
    from torch._inductor.virtualized import V

    @lowering.register_lowering(MADE, type_promotion_kind=None)
    def made(x: Any) -> Any:
        x.realize()
        return lowering.clone(x) if x.get_name() in V.graph.graph_inputs else x


def value_of(node: Node) -> Any:
    """What Dynamo knows of a node's value."""
    return node.meta.get("example_value")


def is_on_gpu(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.is_cuda
