"""A command in a process of its own, which ends before the one that started it does, with all that it has started itself."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil

PATIENCE = 10.0
"""Seconds that a process has for its clearing up once it has been asked to end."""


def run_to_its_end(command: Sequence[str], environment: Mapping[str, str], held: Sequence[int] = ()) -> int:
    """The status that `command` ends with.

    Args:
        held: descriptors of locks, which it holds as well: killed, this process leaves nothing unlocked that still runs.
    """
    with subprocess.Popen(command, env=environment, pass_fds=held) as process:
        try:
            return process.wait()
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C at a terminal has reached all of them; a kill that only this process was sent none, and launchers do not pass it on."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        family = [*reversed(first.children(recursive=True)), first]
        _, living = psutil.wait_procs(family, timeout=1.0)
        for each in living:
            with suppress(psutil.NoSuchProcess):
                each.terminate()
        _, living = psutil.wait_procs(living, timeout=PATIENCE)
        for each in living:
            with suppress(psutil.NoSuchProcess):
                each.kill()
