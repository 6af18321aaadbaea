"""The paper's figures 1 and 2: time and memory of one forward and backward against N and against D.

Figure 1 takes B 32, H 16, D 32 and N from 1,000 to 300,000; figure 2 the same B and H, N 2,000 and D from 32 to 256. Beside softmax and
FLA stands linear attention as plain products, the "kernel separation" that keeps a D x D matrix for every token.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import peers
import torch
from gpu import ours, softmaxes
from gpu_timing import Case, Form, Shape, both, median_ms
from torch import Tensor

LENGTHS = (1000, 3000, 10_000, 30_000, 100_000, 300_000)
DIMS = (32, 64, 96, 128, 192, 256)
NAMES = {
    "linattn": "hf_linattn", "flash": "softmax, flash", "fla fused": "FLA, not normalised", "fla normalised": "FLA, normalised",
    "naive": "kernel separation",
}  # fmt: skip


def kernel_separation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """1 + q.k by a running sum of k v^T over the tokens: (B, H, N, D, D) in memory, for autograd too."""
    sums = (k[..., :, None] * v[..., None, :]).cumsum(2)
    mass = torch.arange(1, q.shape[2] + 1, device=q.device)[:, None] + (q * k.cumsum(2)).sum(-1, keepdim=True)
    return ((v.cumsum(2) + (q[..., None, :] @ sums)[..., 0, :]) / mass).to(q.dtype)


def forms() -> dict[str, Callable[[Shape], Form]]:
    """Name -> shape -> q, k, v -> o; FLA's only where it is installed."""
    here: dict[str, Form] = {"linattn": ours, "flash": softmaxes()["flash softmax"], "naive": kernel_separation}
    found = {name: partial(lambda form, shape: form, form) for name, form in here.items()}
    with contextlib.suppress(ImportError):
        found |= {f"fla {peer.name}": peer.form for peer in peers.fla()}
    return {name: found[name] for name in NAMES if name in found}


def point(form: Form, shape: Shape, layout: str) -> dict[str, float]:
    """Milliseconds of forward and backward, and MiB that they add at their peak."""
    sets = Case(shape).sets(layout)[:2]
    both(form, *sets[0])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both(form, *sets[0])
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"ms": median_ms([partial(both, form, *given) for given in sets], seconds=0.1), "peak_mib": peak}


def sweep(shapes: list[Shape], patience: float = 1.5) -> list[dict]:
    """Every form at every shape, until it is out of memory or its next call, of nine times the work, would take over `patience` seconds."""
    rows: list[dict] = []
    for name, form in forms().items():
        for shape in shapes:
            try:
                row = point(form(shape), shape, "bnhd" if name.startswith("fla") else "bhnd")
            except Exception as problem:  # out of memory, or a shape that a peer refuses
                print(f"{name} {shape}: {str(problem).splitlines()[0][:100]}", file=sys.stderr)
                torch.cuda.empty_cache()
                break
            rows.append({"form": name, "shape": shape, **row})
            print(f"{name:15} {shape}  {row['ms']:.3f} ms, {row['peak_mib']:.0f} MiB", file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
            if row["ms"] * 9 > patience * 1e3 and name in ("flash", "naive"):
                break
    return rows


def draw(rows: list[dict], axis: int, label: str, title: str, path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for panel, field, unit in zip(panels, ("ms", "peak_mib"), ("milliseconds", "MiB beyond the inputs"), strict=True):
        for name in dict.fromkeys(row["form"] for row in rows):
            mine = [row for row in rows if row["form"] == name]
            panel.plot([row["shape"][axis] for row in mine], [row[field] for row in mine], marker="o", label=NAMES[name])
        places = sorted({row["shape"][axis] for row in rows})
        panel.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
        panel.set_xticks(places, [f"{place:,}" for place in places])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(title)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(out: Path, about: dict) -> None:
    """Measures both figures and writes `figure1.png`, `figure2.png` and `figures.json`, each as soon as it is known."""
    where = f"forward and backward, bfloat16, causal, {about['gpu']}"
    found: dict[str, object] = {"machine": about}
    sweeps = {
        "figure1": ([(32, 16, length, 32) for length in LENGTHS], 2, "N, tokens", "B 32, H 16, D 32"),
        "figure2": ([(32, 16, 2000, dim) for dim in DIMS], 3, "D, head dimension", "B 32, H 16, N 2,000"),
    }
    for name, (shapes, axis, label, fixed) in sweeps.items():
        rows = sweep(shapes)
        draw(rows, axis, label, f"{fixed}: {where}", out / f"{name}.png")
        found[name] = rows
        (out / "figures.json").write_text(json.dumps(found, indent=1))
