"""A command run as a launcher runs it, by two processes: forks of this one, which spares them the imports."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.multiprocessing as mp
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from tqdm import tqdm


def launch(command: Callable[..., object], *arguments: Any) -> mp.ProcessContext:
    """Start `command(*arguments)` in two processes that know one another."""
    return mp.start_processes(_as_rank, (_free_port(), command, arguments), nprocs=2, join=False, start_method="fork")


def finish(started: mp.ProcessContext) -> None:
    """Wait until both have ended; raise what one of them raised."""
    while not started.join():
        pass


def _as_rank(rank: int, port: int, command: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # forks share the one they have, and one that is killed while it holds it stops all others for good
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
    command(*arguments)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def as_fsdp2(command: Callable[..., object], state_dict: str, *arguments: Any) -> None:
    """Run `command(*arguments)` as `accelerate launch --use_fsdp --fsdp_version 2` has it; accelerate itself does so on GPUs alone."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": state_dict, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }  # fmt: skip
    made = Accelerator.__init__

    def on_cpus(accelerator: Accelerator, **options: Any) -> None:
        made(accelerator, **options)
        PartialState._shared_state["distributed_type"] = AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)

    with patch.object(Accelerator, "__init__", on_cpus):
        command(*arguments)
