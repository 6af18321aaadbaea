"""Runs trials in a process of their own each, so that a crash or a hang ends one row and not the sweep."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any


@dataclass
class _Running:
    item: Any
    process: int
    deadline: float


def forked(items: list, work: Callable[[Any], dict], jobs: int, seconds: float) -> Iterator[tuple[Any, dict | str]]:
    """(item, result) as they are done, `jobs` at a time; a string instead of the result says why there is none.

    Each process is a fork of this one: what is imported here is imported once.
    """
    waiting, running = list(reversed(items)), dict[Connection, _Running]()
    while waiting or running:
        while waiting and len(running) < jobs:
            item = waiting.pop()
            end, process = _start(work, item)
            running[end] = _Running(item, process, time.monotonic() + seconds)
        for end in wait(list(running), timeout=1.0):
            job = running.pop(end)
            yield job.item, _result(end, job.process)
        for end in [end for end, job in running.items() if time.monotonic() > job.deadline]:
            job = running.pop(end)
            os.kill(job.process, signal.SIGKILL)
            os.waitpid(job.process, 0)
            yield job.item, f"took more than {seconds:.0f} s"


def _start(work: Callable[[Any], dict], item: Any) -> tuple[Connection, int]:
    receiving, sending = Pipe(duplex=False)
    process = os.fork()
    if process:
        sending.close()
        return receiving, process
    try:
        receiving.close()
        sending.send_bytes(json.dumps(work(item)).encode())
        sending.close()
    finally:
        os._exit(0)


def _result(end: Connection, process: int) -> dict | str:
    try:
        return json.loads(end.recv_bytes())
    except EOFError:
        return "the process died"
    finally:
        end.close()
        os.waitpid(process, 0)
