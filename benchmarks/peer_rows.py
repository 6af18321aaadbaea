"""Times the functions of a library (peers.py) in a process of its own; what cannot be imported, refuses or breaks is told in its place."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from gpu_timing import Case, Shape, guarded, refusal
from peers import LIBRARIES, Peer


@contextmanager
def apart(patience: float = 100.0) -> Iterator[Callable[..., Any]]:
    """Calls functions in a process that is ended afterwards, whatever became of it; one that takes over `patience` seconds raises."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    try:
        yield lambda function, *given: pool.submit(function, *given).result(patience)
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()


@cache
def offered(library: str) -> list[Peer]:
    return LIBRARIES[library].offers()


def names_of(library: str) -> tuple[str, list[tuple[str, bool, tuple[Shape, ...] | None]]]:
    """The version, and of each function its name, whether it decays and the shapes that it is asked for."""
    return version(LIBRARIES[library].distribution), [(peer.name, peer.decays, peer.shapes) for peer in offered(library)]


def row_of(library: str, place: int, shape: Shape, bandwidth: float) -> dict[str, float | str]:
    """The times of one function at one shape, in the library's process."""
    peer = offered(library)[place]
    try:
        form = peer.form(shape)
    except Exception as problem:
        return {"forward_refused": refusal(problem)}
    return guarded(form, Case(shape), bandwidth, peer.layout, peer.backward is None or shape in peer.backward)


def warm(library: str, place: int, shape: Shape) -> None:
    """One call, which compiles and tunes, and leaves both on the disk."""
    peer = offered(library)[place]
    leaves, grad = Case(shape).sets(peer.layout)[0]
    with suppress(Exception):  # it will be told where it is timed
        out = peer.form(shape)(*leaves)
        if peer.backward is None or shape in peer.backward:
            torch.autograd.grad(out, leaves, grad)


def warm_side_by_side(library: str, places: list[tuple[int, Shape]], jobs: int = 10) -> None:
    """Every function once for each number of heads and head dim."""
    kinds = {(place, *shape[1::2]): (place, shape) for place, shape in reversed(places)}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for place, shape in reversed(kinds.values()):
            pool.submit(warm, library, place, shape)


def library_rows(library: str, shapes: list[Shape], bandwidth: float) -> tuple[str, list[dict[str, Any]]]:
    """The library's version, or why it did not run, and the rows of its functions."""
    rows: list[dict[str, Any]] = []
    try:
        with apart() as call:
            number, names = call(names_of, library)
            places = [(place, shape) for place, (_, _, asked) in enumerate(names) for shape in asked or shapes]
            if library == "FLA":
                warm_side_by_side(library, places)
            for place, shape in places:
                name, decays, _ = names[place]
                row = call(row_of, library, place, shape, bandwidth)
                rows.append({"form": f"{library}: {name}", "shape": shape, "decays": decays, **row})
                print(f"{time.strftime('%T')} {library}: {name} {shape} {row}", file=sys.stderr, flush=True)
    except Exception as problem:  # it is not installed, it took its process with it, or it took too long
        return f"stopped after {len(rows)} rows: {refusal(problem)}" if rows else refusal(problem), rows
    return number, rows
