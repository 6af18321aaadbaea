"""accelerate's Accelerator as models with linear attention need it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils.fsdp_utils import disable_fsdp_ram_efficient_loading
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor


def new_accelerator(**options: Any) -> Accelerator:
    """An Accelerator by accelerate's configuration and `options`.

    Under FSDP2 every process reads the weights itself. To read them in the first one alone accelerate takes all that a model saves for
    sharded parameters, and what linear attention learns is in part a buffer, since all parameters of a shard must have one dtype.
    What a model gives stays in its precision: accelerate would round losses to half precision too.
    """
    if os.environ.get("FSDP_VERSION") == "2":
        disable_fsdp_ram_efficient_loading()
    accelerator = Accelerator(**options)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
    return accelerator


def whole(value: Tensor | None) -> Tensor | None:
    """A number that FSDP2 has spread over the processes, put together; every process has to ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_part(weight: Tensor) -> Tensor:
    """What this process holds of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
