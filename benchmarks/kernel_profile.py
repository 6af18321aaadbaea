"""What bounds each kernel, by Nsight Compute: shares of the card's peak rates, and what warps wait for.

    ncu --profile-from-start off --clock-control none --csv --metrics "$(python benchmarks/kernel_profile.py metrics)" \
        python benchmarks/kernel_profile.py run > profile.csv
    python benchmarks/kernel_profile.py table profile.csv --out benchmarks/results
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Annotated

import torch
import typer
from gpu import ours

# (dtype, (B, H, N, D), c); the last is profiled forward only
CASES = [
    (torch.bfloat16, (8, 32, 2048, 64), 0.0), (torch.bfloat16, (1, 32, 32768, 64), 0.0), (torch.bfloat16, (1, 32, 131072, 64), 0.0),
    (torch.bfloat16, (25, 4, 4096, 32), 0.0), (torch.bfloat16, (32, 16, 16384, 32), 0.0), (torch.bfloat16, (8, 16, 2048, 128), 0.0),
    (torch.bfloat16, (1, 16, 65536, 128), 0.0), (torch.bfloat16, (8, 32, 2048, 64), 0.5), (torch.bfloat16, (32, 16, 2000, 256), 0.0),
    (torch.float32, (8, 32, 2048, 64), 0.0), (torch.bfloat16, (1, 32, 32768, 64), 0.5),
]  # fmt: skip
RATES = {
    "DRAM": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "L1 and shared": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "tensor cores": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
TIME, BYTES = "gpu__time_duration.sum", "dram__bytes.sum"
WAITS = ("long_scoreboard", "short_scoreboard", "barrier", "wait", "math_pipe_throttle", "mio_throttle", "lg_throttle")
WAIT = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def metrics() -> None:
    """Prints the metrics to ask ncu for."""
    print(",".join([TIME, BYTES, *RATES.values(), *map(WAIT.format, WAITS)]))


@app.command()
def run() -> None:
    """Runs every case once, profiled."""
    for case in CASES:
        dtype, (batch, heads, length, head_dim), c = case
        backward = case is not CASES[-1]
        leaves = [torch.randn(batch, length, heads, head_dim, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3)]
        leaves = [x.requires_grad_(backward) for x in leaves]
        for profiled in (False, True):
            torch.cuda.synchronize()
            if profiled:
                torch.cuda.profiler.start()
            out = ours(*leaves, **({"c": c} if c else {}))
            if backward:
                torch.autograd.grad(out, leaves, torch.ones_like(out))
            torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def kernels_of(path: Path) -> list[dict[str, str]]:
    """The kernels of ncu's CSV in the order they ran: their name, grid and metrics."""
    rows = list(csv.DictReader(line for line in path.read_text().splitlines() if line.startswith('"')))
    kernels: dict[str, dict[str, str]] = {}
    for row in rows:
        kernel = kernels.setdefault(row["ID"], {"name": row["Kernel Name"], "grid": row["Grid Size"]})
        kernel[row["Metric Name"]] = row["Metric Value"].replace(",", "")
    return [kernel for kernel in kernels.values() if "linattn" in kernel["name"] and TIME in kernel]


def short(name: str) -> str:
    """linattn_stream::rows_kernel<__nv_bfloat16, 64, 0, 0>(...) as stream rows <bfloat16, 64, 0, 0>."""
    name = re.sub(r"void |linattn_|<unnamed>::|_kernel|__nv_|\((int|bool)\)", "", name).split("(")[0]
    return name.replace("::", " ").replace("<", " <", 1)


def title(number: int) -> str:
    dtype, shape, c = CASES[number]
    degree, parts = "second degree" if c else "first degree", "forward" if number == len(CASES) - 1 else "forward and backward"
    return f"{shape}, {str(dtype).removeprefix('torch.')}, {degree}, {parts}"


@app.command()
def table(source: Path, out: Annotated[Path, typer.Option(help="Folder for profile.md.")] = Path("benchmarks/results")) -> None:
    """Makes profile.md of ncu's CSV."""
    head = ["kernel", "us", "DRAM, MB", *(f"{name}, %" for name in RATES), "warps that wait, for one that issues"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    number = -1
    ended = True  # a case's last kernel sums the coefficients' gradients
    for kernel in kernels_of(source):
        if ended:
            number += 1
            lines.append(f"| **{title(number)}** |" + " |" * (len(head) - 1))
        ended = "coefficients" in kernel["name"]
        rates = [f"{float(kernel[rate]):.0f}" for rate in RATES.values()]
        figures = " | ".join([f"{float(kernel[TIME]) / 1e3:.1f}", f"{float(kernel[BYTES]) / 1e6:.0f}", *rates])
        waits = sorted(((float(kernel[WAIT.format(name)]), name.replace("_", " ")) for name in WAITS), reverse=True)
        lines.append(f"| {short(kernel['name'])} | {figures} | {', '.join(f'{name} {x:.1f}' for x, name in waits[:3])} |")
    (out / "profile.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app()
