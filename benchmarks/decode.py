"""One new token a sequence on a GPU, and a few: the kernels beside the same step in PyTorch, as multiples of their memory traffic.

    python benchmarks/decode.py [--out benchmarks/results]

The floor reads and writes each state once, at the bandwidth of an addition to a large tensor, measured in the same run. Medians of CUDA
graph replays, each of several steps on states that together outgrow the cache; "eager" is one call from Python after another, host time
included. Of a window the floor also reads its ring once, and in the PyTorch form the state beside it has its kernel all the same. Several
tokens are given as multiples of one token's time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_timing import refusal
from peer_rows import processes
from peers import LIBRARIES

from hf_linattn.ops import cuda, one_token, window_cuda, window_step
from hf_linattn.ops.call import Call
from hf_linattn.ops.features import feature_count
from hf_linattn.ops.ring import Ring
from hf_linattn.ops.window_token import Beside, Token

# (query heads, key heads, heads of the state, head dim, degree)
LAYERS = {
    "32:4, D 64, a decay a key head": (32, 4, 4, 64, 1),
    "32:4, D 64, a decay a query head": (32, 4, 32, 64, 1),
    "32, D 64": (32, 32, 32, 64, 1),
    "16, D 128": (16, 16, 16, 128, 1),
    "9:3, D 64, second degree, a decay a key head": (9, 3, 3, 64, 2),
    "9:3, D 64, second degree, a decay a query head": (9, 3, 9, 64, 2),
    "32:4, D 64, second degree, a decay a key head": (32, 4, 4, 64, 2),
}
# (query heads, key heads, head dim, tokens of the window, features of the second degree beside it)
WINDOWS = {
    "9:3, D 64, a window of 64 + 4 beside the second degree of 16 features": (9, 3, 64, 64, 16),
    "32:4, D 64, a window of 64 + 4 beside the second degree of 16 features": (32, 4, 64, 64, 16),
    "32:4, D 64, a window of 64 + 4 beside the second degree": (32, 4, 64, 64, None),
}
SINKS = 4
BATCHES = (1, 16, 64, 256)
SEVERAL = (2, 4, 8, 16)
Step = Callable[..., torch.Tensor]


def bandwidth_of_memory() -> float:
    """Bytes a second of x + 1, reads and writes counted: what a kernel that does next to nothing reaches."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (replayed(lambda: torch.add(source, 1.0, out=target), 1) / 1e3)


def replayed(run: Callable[[], object], steps: int, repeats: int = 30) -> float:
    """Median milliseconds of a graph replay of `run`, over `steps`."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times) / steps


def eager(run: Callable[[], object], steps: int, repeats: int = 20) -> float:
    """Median milliseconds of a step called from Python."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times) / steps


def measure(layer: tuple[int, int, int, int, int], batch: int, bandwidth: float) -> dict[str, float]:
    heads, key_heads, state_heads, dim, degree = layer
    size = batch * state_heads * feature_count(dim, degree) * (dim + 1) * 4
    steps = max(4, min(64, int(2e8 // size)))  # the states together are larger than the L2 cache, or they are many
    states = [torch.rand(batch, state_heads, feature_count(dim, degree), dim + 1, device="cuda") for _ in range(steps)]
    coefficients = torch.tensor([[1.0], [0.9], [0.5 * (degree - 1)], [1.0]], device="cuda").expand(4, heads).contiguous()
    rates = -torch.rand(state_heads, device="cuda")

    calls = {}
    for length in (1, *SEVERAL):
        query, key, value = (torch.randn(batch, h, length, dim, device="cuda", dtype=torch.bfloat16) for h in (heads, key_heads, key_heads))
        calls[length] = Call(query, key, value, coefficients, rates, degree=degree)

    def run(step: Step, length: int = 1) -> None:
        for state in states:
            step(calls[length], state)

    return {
        "state_bytes": size,
        "floor_ms": 2 * size / bandwidth * 1e3,
        "kernel_ms": replayed(lambda: run(cuda.step), steps),
        "eager_ms": eager(lambda: run(cuda.step), steps),
        "torch_ms": replayed(lambda: run(one_token.step), steps),
        **{f"{length}_tokens_ms": replayed(partial(run, cuda.step, length), steps) for length in SEVERAL},
    }


def peer_figures(library: str, heads: int, dim: int, batch: int) -> dict[str, float]:
    """A library's step on states (B, H, D, D), in a process of its own."""
    size = 4 * batch * heads * dim * dim
    states = [torch.rand(batch, heads, dim, dim, device="cuda") for _ in range(max(4, min(64, int(2e8 // size))))]
    step = LIBRARIES[library].step
    assert step is not None
    made = step(batch, heads, dim)

    def run() -> None:
        for state in states:
            made(state)

    return {"ms": replayed(run, len(states)), "eager_ms": eager(run, len(states))}


def peer_rows(library: str) -> list[dict[str, Any]]:
    """One token by a library, where every head has keys and a state of its own; what it raises ends it."""
    rows: list[dict[str, Any]] = []
    plain = {name: layer for name, layer in LAYERS.items() if len(set(layer[:3])) == 1}
    try:
        with processes() as pool:
            for name, (heads, _, _, dim, _) in plain.items():
                for batch in BATCHES:
                    figures = pool.submit(peer_figures, library, heads, dim, batch).result(60)
                    rows.append({"layer": name, "batch": batch, "library": library, **figures})
    except Exception as problem:
        rows.append({"library": library, "refused": refusal(problem)})
    return rows


def window_token(layer: tuple[int, int, int, int, int | None], batch: int) -> tuple[Token, Beside]:
    """A token, and all of what lies beside its window but the state."""
    heads, key_heads, dim, _, features = layer
    query, key, value = (torch.randn(batch, h, 1, dim, device="cuda", dtype=torch.bfloat16) for h in (heads, key_heads, key_heads))
    matrices = [torch.randn(h, dim, features or dim, device="cuda", dtype=torch.bfloat16) / dim**0.5 for h in (heads, key_heads)]
    beside = Beside(
        gate=torch.rand(batch, heads, 1, device="cuda"),
        coefficients=torch.tensor([[1.0], [0.9], [0.5], [1.0]], device="cuda").expand(4, heads).contiguous(),
        log_decay=-torch.rand(key_heads, device="cuda"), degree=2,
    )  # fmt: skip
    if features:
        center = torch.randn(key_heads, 1, dim, device="cuda", dtype=torch.bfloat16)
        beside = beside._replace(query_matrix=matrices[0], key_matrix=matrices[1], key_center=center)
    return Token(query, key, value), beside


def measure_window(layer: tuple[int, int, int, int, int | None], batch: int, bandwidth: float) -> dict[str, float]:
    _, key_heads, dim, window, features = layer
    shape, slots = (batch, key_heads, feature_count(features or dim, 2), dim + 1), (batch, key_heads, SINKS + window, dim)
    size, ring_size = 4 * math.prod(shape), 2 * 2 * math.prod(slots)
    steps = max(4, min(64, int(2e8 // size)))
    token, beside = window_token(layer, batch)
    states = [torch.rand(shape, device="cuda") for _ in range(steps)]
    rings = [torch.randn(2, *slots, device="cuda", dtype=torch.bfloat16) for _ in range(steps)]
    seen = [torch.full((batch,), 10 * window, device="cuda") for _ in range(steps)]
    layers = [
        (Ring(kept[0], kept[1], count, None, window, SINKS), beside._replace(state=state))
        for kept, count, state in zip(rings, seen, states, strict=True)
    ]

    def run(step: Step) -> None:
        for ring, far in layers:
            step(token, ring, far)

    return {
        "state_bytes": size + ring_size,
        "floor_ms": (2 * size + ring_size) / bandwidth * 1e3,
        "kernel_ms": replayed(lambda: run(window_cuda.step), steps),
        "eager_ms": eager(lambda: run(window_step.step), steps),
        "torch_ms": replayed(lambda: run(window_step.by_operators), steps),
    }


def table(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        f"One new token a sequence and layer, bfloat16 tokens, float32 states: {facts['device']}, torch {facts['torch']}, commit "
        f"{facts['commit']}, memory at {facts['bandwidth_GB_s']:,.0f} GB/s. Microseconds; in brackets multiples of the floor.",
        "",
        "| layer | sequences | state, MB | kernel | PyTorch form | kernel, called from Python |",
        "|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if "kernel_ms" in row):
        kernel, plain = (f"{1e3 * row[name]:.1f} ({row[name] / row['floor_ms']:.1f})" for name in ("kernel_ms", "torch_ms"))
        size, eager_us = row["state_bytes"] / 1e6, 1e3 * row["eager_ms"]
        lines.append(f"| {row['layer']} | {row['batch']} | {size:.1f} | {kernel} | {plain} | {eager_us:.1f} |")
    lines += [
        "",
        "Several tokens in one call, as multiples of one token's time:",
        "",
        "| layer | sequences | one, microseconds | " + " | ".join(map(str, SEVERAL)) + " |",
        "|" + "---|" * (3 + len(SEVERAL)),
    ]
    for row in (row for row in rows if f"{SEVERAL[0]}_tokens_ms" in row):
        multiples = " | ".join(f"{row[f'{length}_tokens_ms'] / row['kernel_ms']:.2f}" for length in SEVERAL)
        lines.append(f"| {row['layer']} | {row['batch']} | {1e3 * row['kernel_ms']:.1f} | {multiples} |")
    return "\n".join([*lines, *peer_table(rows)]) + "\n"


def peer_table(rows: list[dict[str, Any]]) -> list[str]:
    """Others' steps beside the kernel's."""
    found = {(row["layer"], row["batch"], row["library"]): row for row in rows if "ms" in row}
    libraries = list(dict.fromkeys(row["library"] for row in rows if "library" in row))
    lines = ["", "Others' steps with a decay a head, which do not normalise, microseconds (called from Python):", ""]
    lines += [f"{row['library']} refused: {row['refused']}\n" for row in rows if "refused" in row]
    lines += ["| layer | sequences | kernel | " + " | ".join(libraries) + " |", "|" + "---|" * (3 + len(libraries))]
    places = dict.fromkeys((layer, batch) for layer, batch, _ in found)
    ours = {(row["layer"], row["batch"]): {"ms": row["kernel_ms"], **row} for row in rows if "kernel_ms" in row}
    for place in places:
        beside = [ours.get(place), *(found.get((*place, library)) for library in libraries)]
        cells = (f"{1e3 * row['ms']:.1f} ({1e3 * row['eager_ms']:.1f})" if row else "-" for row in beside)
        lines.append(f"| {place[0]} | {place[1]} | " + " | ".join(cells) + " |")
    return lines if libraries else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for decode.json and decode.md; printed only without it")
    out = parser.parse_args().out
    bandwidth = bandwidth_of_memory()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit, "bandwidth_GB_s": bandwidth / 1e9}
    rows = [{"layer": name, "batch": batch, **measure(layer, batch, bandwidth)} for name, layer in LAYERS.items() for batch in BATCHES]
    rows += [
        {"layer": name, "batch": batch, **measure_window(layer, batch, bandwidth)} for name, layer in WINDOWS.items() for batch in BATCHES
    ]
    rows += [row for name, library in LIBRARIES.items() if library.step for row in peer_rows(name)]
    print(table(facts, rows))
    if out:
        (out / "decode.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        (out / "decode.md").write_text(table(facts, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
