"""Times the functions of a library (peers.py) in a process of its own; what cannot be imported, refuses or breaks is told in its place."""

from __future__ import annotations

import multiprocessing
import os
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
def processes(jobs: int = 1) -> Iterator[ProcessPoolExecutor]:
    """That are ended afterwards, whatever became of them."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        yield pool
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
    return guarded(form, Case(shape), bandwidth, peer.layout, peer.differentiates(shape))


def library_rows(library: str, shapes: list[Shape], bandwidth: float, seconds: float, report: Callable[[dict[str, Any]], None]) -> str:
    """Reports each function's row at each shape, for so many seconds; returns the version, or why it did not run, or not on."""
    end, count = time.monotonic() + seconds, 0
    with processes() as pool:

        def call(function: Callable[..., Any], *given: Any) -> Any:
            return pool.submit(function, library, *given).result(end - time.monotonic())

        try:
            told, names = call(names_of)
            for place, (name, decays, asked) in enumerate(names):
                for shape in asked or shapes:
                    report({"form": f"{library}: {name}", "shape": shape, "decays": decays, **call(row_of, place, shape, bandwidth)})
                    count += 1
        except Exception as problem:  # it is not installed, it took its process with it, or its time is over
            return f"{f'{told}, ' if count else ''}{count} rows, then {refusal(problem)}"
    return told


def compile_alone(shapes: list[Shape], first: int, step: int) -> None:
    """Of FLA's functions each `step`-th, once for each number of heads and head dim: its kernels compiled and on the disk, not tuned."""
    os.nice(5)
    os.environ["FLA_CACHE_RESULTS"] = "0"
    kinds = {(place, *s[1::2]): (peer, s) for place, peer in enumerate(offered("FLA")) for s in reversed(peer.shapes or shapes)}
    for peer, shape in list(kinds.values())[first::step]:
        leaves, grad = Case(shape).sets(peer.layout)[0]
        with suppress(Exception):  # it will be told where it is timed
            out = peer.form(shape)(*leaves)
            if peer.differentiates(shape):
                torch.autograd.grad(out, leaves, grad)


@contextmanager
def compiling_meanwhile(shapes: list[Shape], jobs: int = 10) -> Iterator[None]:
    """FLA compiles hundreds of kernels to choose among: with this, while others are timed."""
    with processes(jobs) as pool:
        for first in range(jobs):
            pool.submit(compile_alone, shapes, first, jobs)
        yield
