"""Time and peak memory of linear attention beside softmax attention and the plain formula.

    python benchmarks/attention.py --device cpu [--out benchmarks/results]
    python benchmarks/attention.py --device cuda [--out benchmarks/results]

On a CPU: (1, 8, N, 64) in float32, causal, for N from 512 to 65,536. On a GPU: see `gpu.py` beside this file. A row whose run would take
longer than --patience seconds is left out, and a dash stands for it.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_linattn import linear_attention
from hf_linattn.ops import reference

FORMS: dict[str, Callable] = {
    "linattn": lambda q, k, v: linear_attention(q, k, v),
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "formula": lambda q, k, v: reference(q, k, v),
}
GROWTH = {"linattn": 2, "sdpa": 4, "formula": 4}  # of time, where the length doubles


def peak_memory_of(run: Callable[[], object]) -> float | None:
    """MiB that `run` adds to this process at its peak; None where the system does not tell (it does on Linux)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    except OSError:
        return None

    def kilobytes(field: str) -> int:
        return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)).split()[1])

    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) / 1024


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def forward(form: Callable, inputs: list[Tensor]) -> object:
    return form(*inputs)


def forward_and_backward(form: Callable, inputs: list[Tensor], grad: Tensor) -> object:
    return torch.autograd.grad(form(*inputs), inputs, grad)


def cpu_rows(lengths: list[int], patience: float, rounds: int) -> list[dict]:
    """Each case once a round, so that a machine whose speed drifts slows all of them alike; the median over the rounds."""
    rows: dict[tuple[str, str, int], dict] = {}
    slow: set[tuple[str, str]] = set()
    for turn in range(rounds + 1):  # the first one warms up and measures memory
        for length in lengths:
            torch.manual_seed(0)
            grad = torch.randn(1, 8, length, 64)
            leaves = [torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3)]
            for name, form in FORMS.items():
                runs = {"forward": partial(forward, form, leaves), "forward+backward": partial(forward_and_backward, form, leaves, grad)}
                for direction, run in runs.items():
                    case = name, direction, length
                    if turn == 0 and (name, direction) not in slow and not (name == "formula" and length > 4096):
                        rows[case] = {"form": name, "direction": direction, "length": length, "all_seconds": []}
                        rows[case]["peak_mib"] = peak_memory_of(run)
                        if seconds_of(run) * GROWTH[name] > patience:
                            slow.add((name, direction))
                    elif turn and case in rows:
                        rows[case]["all_seconds"].append(seconds_of(run))
        print(f"round {turn} of {rounds}", file=sys.stderr)
    return [{**row, "seconds": statistics.median(row["all_seconds"])} for row in rows.values()]


def cpu_table(rows: list[dict]) -> list[list[str]]:
    """Rows of text: N, then for each direction ours, nanoseconds a token, SDPA, the formula; and peak memories."""
    found = {(r["form"], r["direction"], r["length"]): r for r in rows}

    def cell(form: str, direction: str, length: int, field: str, scale: float, digits: int) -> str:
        row = found.get((form, direction, length))
        return "-" if row is None or row[field] is None else f"{row[field] * scale:.{digits}f}"

    table = []
    for length in sorted({r["length"] for r in rows}):
        line = [f"{length:,}"]
        for direction in ("forward", "forward+backward"):
            line += [cell(form, direction, length, "seconds", 1e3, 1) for form in FORMS]
            line.append(cell("linattn", direction, length, "seconds", 1e9 / length / 8, 0))
        line += [cell(form, "forward+backward", length, "peak_mib", 1, 0) for form in FORMS]
        table.append(line)
    return table


HEADERS = ["N", "fwd ms", "sdpa", "formula", "ns/token/head"]
HEADERS += ["fwd+bwd ms", "sdpa", "formula", "ns/token/head", "peak MiB", "sdpa", "formula"]


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="A folder for the results as Markdown and JSON.")] = None,
    longest: Annotated[int, typer.Option(help="The longest N on a CPU.")] = 65536,
    patience: Annotated[float, typer.Option(help="Seconds one call may take before longer ones are left out.")] = 10.0,
    rounds: Annotated[int, typer.Option(help="Times each case is run on a CPU, after one warm-up.")] = 7,
) -> None:
    """Time linear attention beside its peers."""
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch finds no usable CUDA device: check the driver with nvidia-smi, or take --device cpu.")
    if device == "cuda":
        import figures
        import gpu

        about = gpu.main(out)
        if out is not None:
            figures.main(out, about)
        return
    if device != "cpu":
        raise typer.BadParameter(f"the device must be cpu or cuda, not {device!r}.")
    lengths = [n for n in (512 * 2**i for i in range(8)) if n <= longest]
    about, rows = machine(), cpu_rows(lengths, patience, rounds)
    table = cpu_table(rows)
    shown = Table(*HEADERS, title=f"(1, 8, N, 64) float32 causal on {about['cpu']}, {about['threads']} threads, torch {about['torch']}")
    for line in table:
        shown.add_row(*line)
    Console(width=150).print(shown)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "cpu.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1))
        lines = ["| " + " | ".join(line) + " |" for line in [HEADERS, ["---:"] * len(HEADERS), *table]]
        conditions = ", ".join(f"{name} {value}" for name, value in about.items())
        title = f"(1, 8, N, 64), float32, causal; medians of {rounds} rounds over all cases. {conditions}."
        (out / "cpu.md").write_text(f"# Attention on a CPU\n\n{title}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
