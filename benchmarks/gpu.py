"""Time and memory of linear attention on a GPU beside its peers, as multiples of the memory-traffic floor and of cuDNN's softmax.

    python benchmarks/gpu.py [--sections plain,decays] [--libraries FLA,Helion] [--out benchmarks/results]

The floor is what any kernel must move (gpu_timing.py) at the card's copy bandwidth, measured in the same run. Times are medians of CUDA
graph replays, and of eager calls beside them. A decay has no gradient here. The peers are optional (peers.py).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from gpu_timing import Case, Form, Shape, copy_gigabytes_per_second, guarded, measure
from peer_rows import compiling_meanwhile, library_rows
from peers import LIBRARIES
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_linattn import linear_attention

# (B, H, N, D), and the targets: multiples of the floor, forward and forward+backward
TARGETS: dict[Shape, tuple[float, float]] = {
    (8, 32, 2048, 64): (1.3, 2.0),
    (8, 16, 2048, 128): (1.8, 2.8),
    (1, 32, 32768, 64): (1.3, 2.0),
    (1, 32, 131072, 64): (1.3, 2.0),
    (25, 4, 4096, 32): (1.3, 2.0),
    (32, 16, 16384, 32): (1.3, 2.0),
    (1, 16, 65536, 128): (1.8, 2.8),
}
SHORT = list(TARGETS)[:3]
CUDNN = "cuDNN's softmax"
Row = dict[str, Any]


def ours(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out = linear_attention(q, k, v, **options)
    assert isinstance(out, Tensor)
    return out


def softmax(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def softmaxes() -> dict[str, Form]:
    return {CUDNN: partial(softmax, SDPBackend.CUDNN_ATTENTION), "flash softmax": partial(softmax, SDPBackend.FLASH_ATTENTION)}


def row_of(form: str, case: Case, figures: dict[str, Any]) -> Row:
    torch.cuda.empty_cache()
    return {"form": form, "shape": case.shape, "key_heads": case.key_heads, "features": case.features, **figures}


def plain_rows(bandwidth: float) -> Iterator[Row]:
    for shape, targets in TARGETS.items():
        case = Case(shape)
        yield row_of("linattn", case, measure(ours, case, bandwidth)) | {"targets": targets}
        for name, form in softmaxes().items():
            yield row_of(name, case, guarded(form, case, bandwidth))


def gates(shape: Shape) -> dict[str, Tensor]:
    batch, heads, length, _ = shape
    return {
        "a decay a head": -0.1 * torch.rand(heads, device="cuda"),
        "a decay a token": -0.1 * torch.rand(batch, heads, length, device="cuda"),
    }


def decay_rows(bandwidth: float) -> Iterator[Row]:
    for shape in TARGETS:
        for name, gate in gates(shape).items():
            yield row_of(f"linattn, {name}", Case(shape), measure(partial(ours, log_decay=gate), Case(shape), bandwidth))


def option_rows(bandwidth: float) -> Iterator[Row]:
    """What packed sequences and noise dropout cost."""
    for shape in SHORT:
        batch, heads, length, _ = shape
        packed = (torch.arange(length, device="cuda") // 700 + 1).expand(batch, -1).contiguous()
        noise: dict[str, Any] = {"dropout_p": torch.tensor(0.1, device="cuda"), "seed": torch.tensor(3, device="cuda")}
        options: dict[str, dict[str, Any]] = {
            "packed": {"segment_ids": packed},
            "noise": noise,
            "a decay a head, packed, noise": {"log_decay": gates(shape)["a decay a head"], "segment_ids": packed, **noise},
        }
        for name, given in options.items():
            yield row_of(name, Case(shape), measure(partial(ours, **given), Case(shape), bandwidth))


def dtype_rows(bandwidth: float) -> Iterator[Row]:
    """Other dtypes, and the second degree without a decay."""
    for shape in SHORT:
        rate = gates(shape)["a decay a head"]
        for name, options, dtype in (
            ("float16", {}, torch.float16), ("float32", {}, torch.float32), ("float32, a decay a head", {"log_decay": rate}, torch.float32),
            ("bfloat16, second degree", {"c": 0.5}, torch.bfloat16),
        ):  # fmt: skip
            case = Case(shape, dtype=dtype)
            yield row_of(name, case, measure(partial(ours, **options), case, bandwidth))


def decays_of_key_heads(key_heads: int) -> dict[str, Tensor]:
    """Their log, by name. The second degree does not meet keys of which a decay leaves nothing: those beyond 260 tokens or more of the
    first decay, none of the slow one; the third is what layers of a model of 2,048 positions start with."""
    rates = {
        "": -0.1 * torch.rand(key_heads), ", a slow decay": torch.full((key_heads,), -1e-4),
        ", decays as layers start": -1 / (1.5 * (2048 / 1.5) ** torch.linspace(0, 1, key_heads)),
    }  # fmt: skip
    return {name: rate.cuda() for name, rate in rates.items()}


def converted_rows(bandwidth: float) -> Iterator[Row]:
    """What converted models run: the second degree beside a decay a key head, of whole keys or of learned features, and softmax."""
    for shape, key_heads in (((8, 32, 2048, 64), 32), ((16, 9, 1024, 64), 3), ((4, 32, 8192, 64), 8), ((1, 32, 32768, 64), 32)):
        batch, heads, length, _ = shape
        decays = decays_of_key_heads(key_heads)
        rate, slow = decays[""], decays[", a slow decay"]
        packed = (torch.arange(length, device="cuda") // 400 + 1).expand(batch, -1).contiguous()
        padded = (torch.arange(length, device="cuda") < length - 100).int().expand(batch, -1).contiguous()
        second = partial(ours, c=0.5, log_decay=rate)
        forms: dict[str, tuple[Form, int | None]] = {
            **{f"second degree{name}": (partial(ours, c=0.5, log_decay=decay), None) for name, decay in decays.items()},
            "second degree, packed by 400": (partial(second, segment_ids=packed), None),
            "second degree, padded": (partial(second, segment_ids=padded), None),
            "second degree, padded, a slow decay": (partial(ours, c=0.5, log_decay=slow, segment_ids=padded), None),
            "second degree of 32 features": (second, 32),
            "second degree of 16 features": (second, 16),
            "second degree of 16 features, behind a window of 64": (partial(second, lag=64), 16),
            "first degree": (partial(ours, log_decay=rate), None),
        }  # fmt: skip
        for name, (form, features) in forms.items():
            case = Case(shape, key_heads, features)
            yield row_of(name, case, measure(form, case, bandwidth))
        # softmax has as many key heads as query heads: grouped, cuDNN takes as long
        yield row_of(CUDNN, Case(shape), guarded(softmaxes()[CUDNN], Case(shape), bandwidth))


def grouped_rows(bandwidth: float) -> Iterator[Row]:
    """32 query heads on 4 and on 32 key heads, whose floors differ."""
    for key_heads in (4, 32):
        case = Case((2, 32, 8192, 64), key_heads)
        yield row_of(f"{key_heads} key heads", case, measure(ours, case, bandwidth))


def padded_rows(bandwidth: float) -> Iterator[Row]:
    """Head dims that are padded with zeros, and those that they are padded to."""
    for dim in (8, 24, 32, 48, 64, 112, 128):
        shape = 8, 16, 2048, dim
        for name, options, dtype in (
            ("bfloat16", {}, torch.bfloat16), ("float32", {}, torch.float32),
            ("bfloat16, a decay a head", {"log_decay": gates(shape)["a decay a head"]}, torch.bfloat16),
            ("bfloat16, second degree", {"c": 0.5}, torch.bfloat16),
        ):  # fmt: skip
            case = Case(shape, dtype=dtype)
            yield row_of(name, case, measure(partial(ours, **options), case, bandwidth))


SECTIONS: dict[str, tuple[str, Callable[[float], Iterator[Row]]]] = {
    "plain": ("Nothing but attention", plain_rows),
    "decays": ("With a decay", decay_rows),
    "converted": ("What converted models run, the second degree and a decay a key head", converted_rows),
    "dtypes": ("In other dtypes, and the second degree", dtype_rows),
    "options": ("With what else multiplies the weights", option_rows),
    "grouped": ("Grouped queries", grouped_rows),
    "padded": ("Head dims that are padded with zeros, and those that they are padded to", padded_rows),
}


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
        about["triton"] = importlib.import_module("triton").__version__
    return about


def markdown(table: list[list[str]]) -> str:
    header, *lines = table
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


HEADER = ["B, H, N, D", "", "forward, ms", "floors", "cuDNN's", "forward+backward, ms", "floors", "cuDNN's", "eager, ms", "peak"]


def line_of(row: Row, softmax: Row) -> list[str]:
    """A row as text; `softmax` is cuDNN's at the same shape, where there is one."""
    batch, heads, length, dim = row["shape"]
    few = row.get("key_heads") or heads
    line = [f"{batch}, {heads if few == heads else f'{heads}:{few}'}, {length}, {dim}", row["form"]]
    for i, name in enumerate(("forward", "both")):
        if f"{name}_ms" not in row:
            line += ["refused" if f"{name}_refused" in row else "-", "-", "-"]
            continue
        floors = f"{row[f'{name}_floors']:.2f}" + (f" (target {row['targets'][i]})" if "targets" in row else "")
        beside = f"{row[f'{name}_ms'] / softmax[f'{name}_ms']:.3g}" if f"{name}_ms" in softmax else "-"
        line += [f"{row[f'{name}_ms']:.3g}{' (eager)' if row.get(f'{name}_not_captured') else ''}", floors, beside]
    eager = " · ".join(f"{row[f'{name}_eager_ms']:.3g}" for name in ("forward", "both") if f"{name}_eager_ms" in row)
    return [*line, eager or "-", f"{row['peak_tensors']:.1f}" if "peak_tensors" in row else "-"]


def table(rows: list[Row], softmaxes: dict[Shape, Row]) -> str:
    """Rows of one shape stand together, in the order of the shapes' first rows."""
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    ordered = sorted(rows, key=lambda row: shapes.index(tuple(row["shape"])))
    return markdown([HEADER, *(line_of(row, softmaxes.get(tuple(row["shape"]), {})) for row in ordered)])


def refusals(sections: dict[str, list[Row]]) -> list[str]:
    """What was refused, by whom and with which words, once each."""
    rows = [row for rows in sections.values() for row in rows]
    names = {"forward_refused": "forward", "both_refused": "backward"}
    return list(dict.fromkeys(f"- {row['form']}, {name}: {row[field]}" for field, name in names.items() for row in rows if field in row))


BESIDE_FLA = (
    "Ours and softmax were timed while FLA's kernels were compiled by other cores, which eager times may show. "
    "A decay is given without a gradient of its own in ours, where\nFLA's forms with a gate compute it."
)


def page(about: dict, sections: dict[str, list[Row]], libraries: dict[str, str]) -> str:
    """The results as Markdown."""
    conditions = ", ".join(f"{name} {value}" for name, value in about.items())
    found = {tuple(row["shape"]): row for rows in sections.values() for row in rows if row["form"] == CUDNN}
    parts = [
        "# Attention on a GPU",
        "bfloat16 where nothing else is said, causal. Medians of CUDA graph replays, as multiples of the memory-traffic floor and of "
        "cuDNN's softmax (bfloat16, no decay) in the same run, and of eager calls, forward · forward+backward; the peak of what these "
        f"add, in tensors. {conditions}.",
        "A decay has time constants of 10 tokens and more where it is not said to be slow (10,000) or what layers start with (1.5 to 2,048 "
        "in equal ratios): beside the second degree times go by it, since keys of which it leaves nothing are not met.",
        *([BESIDE_FLA] if "FLA" in libraries else []),
    ]
    if libraries:
        parts += [
            "Peers, each in a process of its own ([what they are](../peers.py)):",
            markdown([["library", "version, or why it did not run"], *([name, said] for name, said in libraries.items())]),
        ]
    if refused := refusals(sections):
        parts += ["Refused:", "\n".join(refused)]
    for name, rows in sections.items():
        beside = {tuple(row["shape"]): row for row in rows if row["form"] == CUDNN}
        parts += [f"## {SECTIONS[name][0]}", table(rows, found | beside)]
    return "\n\n".join([*parts, "Notes on these figures: [notes.md](notes.md)."]) + "\n"


def save(out: Path | None, about: dict, sections: dict[str, list[Row]], libraries: dict[str, str]) -> None:
    """Written after every row: what ends the run leaves what was measured."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.json").write_text(json.dumps({"machine": about, "peers": libraries, **sections}, indent=1))
        (out / "gpu.md").write_text(page(about, sections, libraries))


def main(
    out: Annotated[Path | None, typer.Option(help="A folder for gpu.json and gpu.md; printed only without it.")] = None,
    sections: Annotated[str, typer.Option(help="What of ours to time.")] = ",".join(SECTIONS),
    libraries: Annotated[str, typer.Option(help="Peers to time.")] = ",".join(LIBRARIES),
    seconds: Annotated[float, typer.Option(help="For ours; what comes later is left out.")] = 600.0,
    library_seconds: Annotated[float, typer.Option(help="For each library.")] = 300.0,
) -> dict:
    """Time linear attention on a GPU beside its peers; returns what a figure must stand beside."""
    start, bandwidth = time.monotonic(), copy_gigabytes_per_second()
    torch.cuda.empty_cache()
    about = machine(**{"copy GB/s": round(bandwidth)})
    found: dict[str, list[Row]] = {}
    told: dict[str, str] = {}

    def report(section: str, row: Row) -> None:
        found.setdefault(section, []).append(row)
        times = " ".join(f"{row.get(name, 0):.4g}" for name in ("forward_ms", "both_ms", "forward_eager_ms", "both_eager_ms"))
        refused = " ".join(str(row[name]) for name in ("forward_refused", "both_refused") if name in row)
        print(f"{time.monotonic() - start:.0f} s {row['form']} {row['shape']} {times} {refused}", file=sys.stderr, flush=True)
        save(out, about, found, told)

    def report_peer(row: Row) -> None:
        report("decays" if row["decays"] else "plain", row)

    with compiling_meanwhile(list(TARGETS)) if "FLA" in libraries.split(",") else contextlib.nullcontext():
        rows = ((name, row) for name in filter(None, sections.split(",")) for row in SECTIONS[name][1](bandwidth))
        for section, row in rows:
            report(section, row)
            if time.monotonic() - start > seconds:
                told["linattn"] = f"stopped after {seconds:.0f} s, in: {SECTIONS[section][0]}"
                break
    for library in filter(None, libraries.split(",")):
        told[library] = library_rows(library, list(TARGETS), bandwidth, library_seconds, report_peer)
        print(f"{time.monotonic() - start:.0f} s {library}: {told[library]}", file=sys.stderr, flush=True)
    save(out, about, found, told)
    print(page(about, found, told))
    return about


if __name__ == "__main__":
    typer.run(main)
