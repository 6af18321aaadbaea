"""A command run as a launcher runs it, by two processes: forks of this one, which spares them the imports."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState


def launch(command: Callable[..., object], *arguments: Any) -> mp.ProcessContext:
    """Start `command(*arguments)` in two processes that know one another."""
    return mp.start_processes(_as_rank, (_free_port(), command, arguments), nprocs=2, join=False, start_method="fork")


def finish(started: mp.ProcessContext) -> None:
    """Wait until both have ended; raise what one of them raised."""
    while not started.join():
        pass


def _as_rank(rank: int, port: int, command: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
    command(*arguments)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
