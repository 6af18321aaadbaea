"""Layers compiled by torch.compile in their places, so that the names of weights stay what they are.

accelerate compiles by wrapping, which renames the weights of every checkpoint and of the model that is saved. What it is configured for
(``accelerate launch --dynamo_backend inductor``) is therefore taken from it and done here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

GRAPHS = 32
"""For layers of one class: the student's and the teacher's, softmax and linear, in training and in validation, for rows of one length
and another. torch.compile keeps 8, and runs what needs more of them uncompiled."""


def compile_options(accelerator: Accelerator, asked: bool = False) -> dict[str, Any] | None:
    """What torch.compile is to be told, or None where nothing is to be compiled; `accelerator` itself compiles nothing after this.

    Args:
        accelerator: its configuration counts where it says to compile.
        asked: whether to compile in any case.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return {} if asked else None
    options: dict[str, Any] = plugin.to_kwargs()
    options.pop("use_regional_compilation", None)  # layer by layer is what is done here
    plugin.backend = DynamoBackend.NO
    return options


def layers(model: Any) -> list[nn.Module]:
    """The layers of a model of Transformers, which are alike, so that one is compiled for all; the model itself where it names none."""
    names = getattr(model, "_no_split_modules", None) or []
    return [module for module in model.modules() if type(module).__name__ in names] or [model]


def compile_in_place(modules: Iterable[nn.Module], told: dict[str, Any]) -> None:
    """Has each of the modules compiled when it is first called."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for module in modules:
        module.compile(**told)
