"""A command in a process of its own, which ends before the one that started it does, with all that it has started itself."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil

PATIENCE = 10.0
"""Seconds that a process has for its clearing up once it has been asked to end."""


def run_to_its_end(command: Sequence[str], environment: Mapping[str, str], held: Sequence[int] = ()) -> int:
    """The status that `command` ends with.

    Ctrl-C at a terminal goes to all processes there at once, whatever they are at, and a Python that is still starting or importing has
    nothing but a traceback for it. So what is started here does not hear it: this process alone does, and asks the others to end.

    Args:
        held: descriptors of locks, which it holds as well: killed, this process leaves nothing unlocked that still runs.
    """
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a process inherits what is blocked
    try:
        with subprocess.Popen(command, env=environment, pass_fds=held) as process:
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, heard)  # raises a KeyboardInterrupt that came in between
                return process.wait()
            except BaseException:
                _end(process)
                raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks each for itself, since launchers do not pass it on; who started others comes first, as it would take their end for a fault."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        living = [first, *first.children(recursive=True)]
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for each in living:
                with suppress(psutil.NoSuchProcess):
                    end(each)
            _, living = psutil.wait_procs(living, timeout=PATIENCE)
