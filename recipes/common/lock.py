"""A folder held by one process, for as long as that process lives, or one that it hands the lock on to, and no longer."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from recipes.common.marks import LOCK


class Lock:
    """A folder that is held, until `release` or the end of the process, however it ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def handed_on(self) -> tuple[int, ...]:
        """Descriptors for a process that is started (`pass_fds`): the folder is held until both have let go of it."""
        return (self._descriptor,) if self._descriptor >= 0 else ()

    def release(self) -> None:
        """Let go of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = release


def lock(folder: Path, wait: float = 0.0) -> Lock | None:
    """Hold `folder`; None where another process does, still after `wait` seconds.

    The folder itself is locked, and keeps its lock when it is renamed. Network file systems lock only files that can be written: there
    it is a small file in it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Lock(descriptor)
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(descriptor)
                return None
            time.sleep(0.01)
        except OSError:
            os.close(descriptor)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
