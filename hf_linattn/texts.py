"""Which threads generate texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

_running: dict[int, int] = {}
"""By thread, how many texts it generates, one inside another."""


@contextmanager
def text() -> Iterator[None]:
    """While `generate` decodes in this thread."""
    thread = get_ident()
    _running[thread] = _running.get(thread, 0) + 1
    try:
        yield
    finally:
        _running[thread] -= 1
        if not _running[thread]:
            del _running[thread]


def is_generating() -> bool:
    """Whether this thread does."""
    return get_ident() in _running


def others_generate() -> bool:
    """Whether another thread does."""
    return any(thread != get_ident() for thread in list(_running))
