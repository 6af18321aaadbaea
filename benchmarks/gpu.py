"""Time and memory of linear attention on a GPU beside its peers, as multiples of the memory-traffic floor.

    python benchmarks/attention.py --device cuda [--out benchmarks/results]

The floor is what any kernel must move at the card's copy bandwidth, measured in the same run: q, k, v and o forward (4 tensors); q, k, v,
o, dO and the three gradients backward (8). Medians over CUDA events, over several sets of random inputs that outgrow the cache.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_linattn import linear_attention

# (B, H, N, D), and the targets: multiples of the floor, forward and forward+backward
TARGETS = {
    (8, 32, 2048, 64): (1.3, 2.0),
    (1, 32, 32768, 64): (1.3, 2.0),
    (1, 32, 131072, 64): (1.3, 2.0),
    (25, 4, 4096, 32): (1.3, 2.0),
    (32, 16, 16384, 32): (1.3, 2.0),
    (8, 16, 2048, 128): (1.8, 2.8),
    (1, 16, 65536, 128): (1.8, 2.8),
}
Shape = tuple[int, int, int, int]


def ours(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out = linear_attention(q, k, v, **options)
    assert isinstance(out, Tensor)
    return out


def softmax(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def fla_form(name: str, normalize: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FLA's layout is (B, N, H, D); not normalised it computes less than ours."""
    run = getattr(importlib.import_module("fla.ops.linear_attn"), name)
    out = run(*(x.transpose(1, 2).contiguous() if not x.transpose(1, 2).is_contiguous() else x.transpose(1, 2) for x in (q, k, v)),
              normalize=normalize)  # fmt: skip
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def forms() -> dict[str, Callable[..., Tensor]]:
    """Name -> q, k, v -> o; FLA's only where it is installed."""
    found: dict[str, Callable[..., Tensor]] = {
        "linattn": ours,
        "flash": partial(softmax, SDPBackend.FLASH_ATTENTION),
        "cudnn": partial(softmax, SDPBackend.CUDNN_ATTENTION),
    }
    try:
        importlib.import_module("fla.ops.linear_attn")
    except ImportError:
        return found
    found["fla chunk"] = partial(fla_form, "chunk_linear_attn", False)
    found["fla fused"] = partial(fla_form, "fused_chunk_linear_attn", False)
    found["fla normalised"] = partial(fla_form, "chunk_linear_attn", True)
    return found


def median_ms(runs: list[Callable[[], object]], seconds: float = 0.25) -> float:
    """Median milliseconds of one call, the calls taken in turn so that their inputs rotate."""
    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    runs[-1]()
    torch.cuda.synchronize()
    repeats = max(5, min(50, int(seconds / (time.perf_counter() - start))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (before, after) in enumerate(events):
        before.record()
        runs[i % len(runs)]()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph, so that what the host does between kernels is not timed; `run` itself where it cannot be captured."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay


def copy_gigabytes_per_second() -> float:
    """Device-to-device copy, bytes read plus bytes written."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / median_ms([lambda: target.copy_(source)]) / 1e6


def input_sets(
    shape: Shape, layout: str, key_heads: int | None = None, dtype: torch.dtype = torch.bfloat16, features: int | None = None
) -> list[tuple[list[Tensor], Tensor]]:
    """Sets of (q, k, v), grad, as many as outgrow the L2 cache; "bhnd", or "bnhd" as Transformers and FLA lay them out.

    features: the dim of queries and keys, where it is not that of values.
    """
    batch, heads, length, dim = shape
    sets = max(1, min(4, int(4e8 / (2 * batch * heads * length * dim)) + 1))

    def made(h: int, d: int) -> Tensor:
        if layout == "bnhd":
            return torch.randn(batch, length, h, d, device="cuda", dtype=dtype).transpose(1, 2)
        return torch.randn(batch, h, length, d, device="cuda", dtype=dtype)

    kh, narrow = key_heads or heads, features or dim
    leaves = ((heads, narrow), (kh, narrow), (kh, dim))
    return [([made(*size).requires_grad_() for size in leaves], made(heads, dim)) for _ in range(sets)]


def both(form: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(form(*leaves), leaves, grad)


def forward_only(form: Callable[..., Tensor], leaves: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return form(*leaves)


def measure(
    form: Callable[..., Tensor], shape: Shape, layout: str = "bhnd", key_heads: int | None = None, dtype: torch.dtype = torch.bfloat16,
    features: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Milliseconds forward and forward+backward, and the peak of what the latter adds, in tensors of `shape`."""
    sets = input_sets(shape, layout, key_heads, dtype, features)
    eager_ms = median_ms([partial(both, form, leaves, grad) for leaves, grad in sets])
    forward_ms = median_ms([captured(partial(forward_only, form, leaves)) for leaves, _ in sets])
    both_ms = median_ms([captured(partial(both, form, leaves, grad)) for leaves, grad in sets])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both(form, *sets[0])
    torch.cuda.synchronize()
    batch, heads, length, dim = shape
    peak = (torch.cuda.max_memory_allocated() - before) / (dtype.itemsize * batch * heads * length * dim)
    return {"forward_ms": forward_ms, "both_ms": both_ms, "eager_both_ms": eager_ms, "peak_tensors": peak}


def floors_ms(shape: Shape, bandwidth: float) -> tuple[float, float]:
    """Forward (4 tensors) and forward+backward (12)."""
    batch, heads, length, dim = shape
    tensor = 2 * batch * heads * length * dim / bandwidth / 1e6
    return 4 * tensor, 12 * tensor


def target_rows(bandwidth: float, peers: bool = True) -> list[dict]:
    rows: list[dict] = []
    for shape, (forward_target, both_target) in TARGETS.items():
        forward_floor, both_floor = floors_ms(shape, bandwidth)
        for name, form in forms().items():
            if not peers and name != "linattn":
                continue
            try:
                figures = measure(form, shape, "bnhd" if name.startswith("fla") else "bhnd")
            except Exception as problem:  # a peer that refuses a shape is a dash in the table
                if name == "linattn":
                    raise
                rows.append({"form": name, "shape": shape, "refused": str(problem).splitlines()[0][:200]})
                torch.cuda.empty_cache()
                continue
            floors = {"forward_floors": figures["forward_ms"] / forward_floor, "both_floors": figures["both_ms"] / both_floor}
            targets = {"forward_target": forward_target, "both_target": both_target}
            rows.append({"form": name, "shape": shape, **figures, **floors, **targets})
            print(f"{name:15} {shape}  {figures['forward_ms']:.3f} ms, {figures['both_ms']:.3f} ms", file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
    return rows


def grouped_rows() -> list[dict]:
    """32 query heads on 4 and on 32 key heads."""
    shape = (2, 32, 8192, 64)
    return [{"form": "linattn", "shape": shape, "key_heads": heads, **measure(ours, shape, key_heads=heads)} for heads in (4, 32)]


def option_rows(bandwidth: float) -> list[dict]:
    """What a decay, packed sequences and noise dropout cost."""
    rows = []
    for shape in [(8, 32, 2048, 64), (1, 32, 32768, 64), (8, 16, 2048, 128)]:
        batch, heads, length, _ = shape
        rate = -0.1 * torch.rand(heads, device="cuda")
        gate = -0.1 * torch.rand(batch, heads, length, device="cuda")
        packed = (torch.arange(length, device="cuda") // 700 + 1).expand(batch, -1).contiguous()
        noise: dict[str, Any] = {"dropout_p": torch.tensor(0.1, device="cuda"), "seed": torch.tensor(3, device="cuda")}
        options: dict[str, dict[str, Any]] = {
            "nothing": {}, "decay a head": {"log_decay": rate}, "decay a token": {"log_decay": gate}, "packed": {"segment_ids": packed},
            "noise": noise, "decay a head, packed, noise": {"log_decay": rate, "segment_ids": packed, **noise},
        }  # fmt: skip
        for name, given in options.items():
            figures = measure(partial(ours, **given), shape)
            floors = floors_ms(shape, bandwidth)
            multiples = {"forward_floors": figures["forward_ms"] / floors[0], "both_floors": figures["both_ms"] / floors[1]}
            rows.append({"options": name, "shape": shape, **figures, **multiples})
    return rows


def dtype_rows() -> list[dict]:
    """The first degree in each dtype, and the second in bfloat16."""
    rows = []
    for shape in [(8, 32, 2048, 64), (1, 32, 32768, 64), (8, 16, 2048, 128)]:
        for name in ("bfloat16", "float16", "float32"):
            rows.append({"options": name, "shape": shape, **measure(ours, shape, dtype=getattr(torch, name))})
        rows.append({"options": "bfloat16, second degree", "shape": shape, **measure(partial(ours, c=0.5), shape)})
    return rows


def converted_rows() -> list[dict]:
    """What converted models run: the second degree beside a decay a key head, of whole keys or of learned features, and softmax."""
    rows = []
    for shape, key_heads in (((16, 9, 1024, 64), 3), ((8, 32, 2048, 64), 32), ((4, 32, 8192, 64), 8)):
        batch, heads, length, _ = shape
        rate = -0.1 * torch.rand(key_heads, device="cuda")
        packed = (torch.arange(length, device="cuda") // 400 + 1).expand(batch, -1).contiguous()
        padded = (torch.arange(length, device="cuda") < length - 100).int().expand(batch, -1).contiguous()
        second = partial(ours, c=0.5, log_decay=rate)
        forms: dict[str, tuple[Callable[..., Tensor], int | None]] = {
            "second degree of 16 features, behind a window of 64": (partial(second, lag=64), 16),
            "second degree of 32 features": (second, 32), "second degree": (second, None),
            "second degree, packed by 400": (partial(second, segment_ids=packed), None),
            "second degree, padded": (partial(second, segment_ids=padded), None), "first degree": (partial(ours, log_decay=rate), None),
            "cuDNN's softmax, no decay, as many key heads": (partial(softmax, SDPBackend.CUDNN_ATTENTION), None),
        }  # fmt: skip
        for name, (form, features) in forms.items():
            given = None if name.startswith("cuDNN") else key_heads
            rows.append(
                {"options": name, "shape": shape, "key_heads": key_heads, **measure(form, shape, key_heads=given, features=features)}
            )
    return rows


def padded_rows() -> list[dict]:
    """Head dims that are padded with zeros, and those that they are padded to."""
    rows = []
    for dim in (8, 24, 32, 48, 64, 112, 128):
        shape = 8, 16, 2048, dim
        for name in ("bfloat16", "float32"):
            rows.append({"options": name, "shape": shape, **measure(ours, shape, dtype=getattr(torch, name))})
        rate = -0.1 * torch.rand(16, device="cuda")
        rows.append({"options": "bfloat16, decay a head", "shape": shape, **measure(partial(ours, log_decay=rate), shape)})
        rows.append({"options": "bfloat16, second degree", "shape": shape, **measure(partial(ours, c=0.5), shape)})
    return rows


def said(*command: str) -> str | None:
    """The first line a command prints, None where it cannot run."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0] if lines else None


def machine(**measured: object) -> dict:
    """What a figure must stand beside, and what was measured of the card itself."""
    about = {
        "gpu": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "commit": said("git", "rev-parse", "--short", "HEAD"),
        **measured,
        "date": time.strftime("%Y-%m-%d"),
    }
    with contextlib.suppress(ImportError):
        about["fla"] = importlib.import_module("fla").__version__
    return about


def target_table(rows: list[dict]) -> list[list[str]]:
    names = list(dict.fromkeys(row["form"] for row in rows))
    found = {(row["form"], tuple(row["shape"])): row for row in rows}
    table = []
    for shape, (forward_target, both_target) in TARGETS.items():
        if ("linattn", shape) not in found:
            continue
        line = [", ".join(map(str, shape)), f"{forward_target} · {both_target}"]
        for name in names:
            row = found.get((name, shape), {})
            line.append(figures_of(row) if "forward_ms" in row else "-")
        table.append(line)
    return [["B, H, N, D", "target", *names], *table]


def figures_of(row: dict) -> str:
    multiples = (f" ({row[name]:.2f})" if name in row else "" for name in ("forward_floors", "both_floors"))
    times = (f"{row[name]:.3g}{multiple}" for name, multiple in zip(("forward_ms", "both_ms"), multiples, strict=True))
    return " · ".join([*times, f"{row['peak_tensors']:.1f}"])


def option_table(rows: list[dict]) -> list[list[str]]:
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    found = {(row["options"], tuple(row["shape"])): row for row in rows}
    names = dict.fromkeys(row["options"] for row in rows)
    header = ["", *(", ".join(map(str, shape)) for shape in shapes)]
    return [header, *([name, *(figures_of(found[name, shape]) for shape in shapes)] for name in names)]


def markdown(table: list[list[str]]) -> str:
    header, *lines = table
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def main(out: Path | None, peers: bool = True) -> dict:
    """Prints the table of targets; with `out`, writes it there as Markdown and JSON. Returns what a figure must stand beside."""
    bandwidth = copy_gigabytes_per_second()
    torch.cuda.empty_cache()
    about, rows = machine(**{"copy GB/s": round(bandwidth)}), target_rows(bandwidth, peers)
    grouped, options, dtypes, padded, converted = grouped_rows(), option_rows(bandwidth), dtype_rows(), padded_rows(), converted_rows()
    header, *lines = table = target_table(rows)
    title = "bfloat16, causal; ms forward (times the floor) · ms forward+backward (times the floor) · peak memory in tensors"
    shown = Table(*header, title=f"{about['gpu']}: {title}")
    for line in lines:
        shown.add_row(*line)
    Console(width=200).print(shown)
    ratio = grouped[1]["both_ms"] / grouped[0]["both_ms"]
    few, many = (f"{row['both_ms']:.3f} ms" for row in grouped)
    sentence = f"Grouped queries, (2, 32, 8192, 64), forward+backward: 32:4 takes {few}, 32:32 {many}: {ratio:.2f} times as fast."
    print(sentence)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.json").write_text(
            json.dumps({"machine": about, "rows": rows, "grouped": grouped, "options": options, "dtypes": dtypes, "converted": converted,
                        "padded": padded}, indent=1)
        )  # fmt: skip
        conditions = ", ".join(f"{name} {value}" for name, value in about.items())
        paragraphs = [
            "# Attention on a GPU", f"{title}. {conditions}.", markdown(table), sentence,
            "The same with what multiplies the weights:", markdown(option_table(options)), "In other dtypes, and the second degree:",
            markdown(option_table(dtypes)), "What converted models run, a decay a key head, 3, 32 and 8 of them:",
            markdown(option_table(converted)), "Head dims that are padded with zeros, and those that they are padded to:",
            markdown(option_table(padded)), "Notes on these figures: [notes.md](notes.md).",
        ]  # fmt: skip
        (out / "gpu.md").write_text("\n\n".join(paragraphs) + "\n")
    return about


if __name__ == "__main__":
    main(None)
