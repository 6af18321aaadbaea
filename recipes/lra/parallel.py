"""Work spread over processes, with results in order."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(worker: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """worker(item) for each item, in order, at most two per process ahead of the reader. `items` may be endless; stop reading to stop the
    work."""
    if processes <= 1:
        yield from map(worker, items)
        return
    # spawn: a forked child of a process with threads (torch, tqdm) can hang
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        source = iter(items)
        waiting = deque(pool.apply_async(worker, (item,)) for item, _ in zip(source, range(2 * processes), strict=False))
        while waiting:
            result = waiting.popleft().get()
            for item in source:
                waiting.append(pool.apply_async(worker, (item,)))
                break
            yield result
