"""Generating, as a user types it: time and memory of a token against context and batch, beside softmax, all in one run.

    python benchmarks/generate.py --device cpu [--out benchmarks/results]
    python benchmarks/generate.py --device cuda --shape tinyllama --contexts 1024,32768,262144 --batches 1,16,256 \
        --most 262144 --tokens 64 --jobs 8 [--out benchmarks/results]

Random weights of one shape, as converted models of several forms; the end of the text is never the likeliest token. A prompt of so many
tokens is processed, then tokens are drawn by `model.generate(..., cache_implementation=...)`, and a streamer looks at the clock at each of
them. Where the cache is static, `generate` compiles the step on accelerators, and does not on a CPU. There one thread works, and its own
time is counted, so that other programs take none of it. Cases may warm up and compile side by side, a process each; one at a time is
timed, while no other one runs. Behind a long prompt a GPU's clock stays low for 50 ms: the median of 64 tokens is one of those behind.

Contexts of one batch come one after the other, the longest first. Where no layer is softmax one graph serves them all, and compiling is
told of the first: with nothing kept from before, and of each case's first in brackets with what PyTorch keeps on disk.

What is known so far is written after each row. A case that fails ends the others as little as a run that is cut short does.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import importlib.util
import json
import multiprocessing
import os
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import machine
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from hf_linattn import LinAttnConfig, cache_bytes
from hf_linattn.models import config_class_for

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64},
    "small": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": 4096},
    "tinyllama": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}  # fmt: skip
SECOND = {"kernel": "quadratic", "decay": "key_head"}
WINDOW = {"form": "window", "window": 64, "sinks": 4, "gate": "token", **SECOND}
TUNED = "softmax, static, tuned"  # matrices that meet one row multiplied as in our compiled step
CASES: dict[str, tuple[dict[str, Any] | None, str]] = {
    "softmax, dynamic": (None, "dynamic"),
    "softmax, static": (None, "static"),
    TUNED: (None, "static"),
    "linear, decay, dynamic": ({"decay": "head"}, "dynamic"),
    "linear, decay, static": ({"decay": "head"}, "static"),
    "second degree, static": (SECOND, "static"),
    "window 64 + second degree, static": (WINDOW, "static"),
    "the same, one layer of softmax, static": (WINDOW | {"softmax_layers": [1]}, "static"),
}
SOFTMAX_LONGEST = 131_072  # tokens of a prompt beyond which softmax is left out: its prompts take minutes
SETTLED = 4  # tokens of a call that are not timed: the first comes with the prompt, the next may still warm up


class Clock(BaseStreamer):
    """When each token came, in seconds; `generate` hands tokens over on the CPU, so that the device has finished them."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.times: list[float] = []
        self.now = now

    def put(self, value: torch.Tensor) -> None:
        self.times.append(self.now())

    def end(self) -> None:
        pass


def model_of(shape: str, options: dict[str, Any] | None, longest: int, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of random weights: softmax, or converted with these options."""
    sizes: dict[str, Any] = {**SHAPES[shape], "max_position_embeddings": longest}
    torch.manual_seed(0)
    if options is None:
        config = LlamaConfig(**sizes)
    else:
        config = config_class_for("llama")(**sizes, linattn=LinAttnConfig(learnable=True, **options).to_dict())
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[config.eos_token_id] = 0  # others are above 0
    return model  # type: ignore[no-any-return]


def generate(model: PreTrainedModel, name: str, ids: torch.Tensor, tokens: int, **more: Any) -> Any:
    """As a user types it."""
    if name == TUNED:
        asked = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
        more["compile_config"] = CompileConfig(mode=None, options=asked)  # type: ignore[arg-type]
    given = {"attention_mask": torch.ones_like(ids), "cache_implementation": CASES[name][1], "pad_token_id": 0, **more}
    return model.generate(ids, do_sample=False, max_new_tokens=tokens, **given)  # type: ignore[operator]


def call(model: PreTrainedModel, name: str, ids: torch.Tensor, tokens: int, **more: Any) -> tuple[list[float], Any]:
    """Seconds of the prompt and its first token, then of each token; what `generate` returns."""
    clock = Clock(time.process_time if model.device.type == "cpu" else time.perf_counter)
    out = generate(model, name, ids, tokens, streamer=clock, **more)
    return [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)], out


@contextmanager
def turn(lock: Path, alone: bool) -> Iterator[None]:
    """While this lasts nobody else has a turn alone, and if this one is `alone`, nobody has any."""
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def measure(model: PreTrainedModel, name: str, ids: torch.Tensor, tokens: int, rounds: int, lock: Path) -> dict[str, float | None]:
    """One case: after a call that warms up, and may compile, the medians of `rounds` calls."""
    on_gpu = model.device.type == "cuda"
    first, size = warm_up(model, name, ids, tokens, lock)
    with turn(lock, alone=True):
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if on_gpu else 0
        calls = [call(model, name, ids, tokens)[0] for _ in range(rounds)]
        peak = torch.cuda.max_memory_allocated() - held if on_gpu else None
    token = statistics.median(t for times in calls for t in times[SETTLED:])
    return {
        "prompt_s": statistics.median(times[0] for times in calls),
        "token_ms": 1e3 * token,
        "tokens_a_second": len(ids) / token,
        "cache_bytes": size,
        "peak_bytes": peak,
        "first_s": first - statistics.median(map(sum, calls)),
    }


def warm_up(model: PreTrainedModel, name: str, ids: torch.Tensor, tokens: int, lock: Path) -> tuple[float, int]:
    """Seconds that a call takes, side by side with others' if the device's memory suffices, and bytes of its cache."""

    def work() -> tuple[float, int]:
        times, out = call(model, name, ids, tokens, return_dict_in_generate=True)
        return sum(times), cache_bytes(out.past_key_values)

    try:
        with turn(lock, alone=False):
            return work()
    except torch.OutOfMemoryError:
        forget(model)
        with turn(lock, alone=True):
            return work()


def forget(model: PreTrainedModel) -> None:
    """Leaves nothing of the case before: what was compiled, how long its static cache was, and its memory, which others need."""
    torch._dynamo.reset()
    model.__dict__.pop("_previous_max_cache_length", None)
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def rows_of(name: str, shape: str, device: str, sizes: list[tuple[int, int]], tokens: int, rounds: int, lock: Path, told: Any) -> None:
    """One case at every (batch, context); each row is put into the queue `told`."""
    os.environ |= dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), tempfile.mkdtemp())  # what other cases compiled is no help
    if device == "cpu":
        torch.set_num_threads(1)
    options, _ = CASES[name]
    sizes = [size for size in sizes if options or size[1] <= SOFTMAX_LONGEST]
    if not sizes:
        return
    longest, is_shared = max(context for _, context in sizes) + tokens, bool(options) and "softmax_layers" not in (options or {})
    model = model_of(shape, options, longest, device, torch.bfloat16 if device == "cuda" else torch.float32)
    before: dict[str, Any] = {}
    for batch, context in sorted(sizes, key=lambda size: (size[0], -size[1])):
        row: dict[str, Any] = {"case": name, "batch": batch, "context": context}
        is_new = not is_shared or not before or before["batch"] != batch or "out_of_memory" in before
        compiles = is_new and device == "cuda" and CASES[name][1] == "static"
        try:
            if is_new:
                forget(model)
            ids = torch.randint(3, 60, (batch, context), device=device)
            row |= measure(model, name, ids, tokens, rounds, lock)
            first = row.pop("first_s")
            row["compile_s"] = first if compiles else None
            if compiles and not before:
                forget(model)
                row["compile_again_s"] = warm_up(model, name, ids, tokens, lock)[0] - row["prompt_s"] - (tokens - 1) * row["token_ms"] / 1e3
        except torch.OutOfMemoryError:
            row["out_of_memory"] = True
        told.put(row)
        before = row


def all_rows(cases: list[str], jobs: int, **asked: Any) -> Iterator[dict[str, Any]]:
    """Every case at every (batch, context), `jobs` cases at once, each row as soon as it is known."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.NamedTemporaryFile() as lock, spawn.Manager() as manager, ProcessPoolExecutor(jobs, spawn) as pool:
        told = manager.Queue()
        work = partial(rows_of, lock=Path(lock.name), told=told, **asked)
        running = [pool.submit(work, name) for name in cases]
        while not all(case.done() for case in running) or not told.empty():
            with suppress(queue.Empty):
                yield told.get(timeout=0.2)
        for case in running:
            case.result()  # or what it failed of


def table(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# Generating",
        "",
        f"{'bfloat16' if facts['device'] != 'cpu' else 'float32'}, random weights, {', '.join(f'{k} {v}' for k, v in facts.items())}.",
        "",
        "Medians. The prompt's time includes the first token. The peak is beside the weights. Compiling: cold, and in brackets with what "
        "lies on disk from then. A dash: not there, or compiled already; x: out of memory."
        + (" One thread, its own time." if facts["device"] == "cpu" else ""),
        "",
        "| batch | context | attention, cache | ms a token | tokens a second | cache, MB | peak, MB | prompt, s | compiling, s |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        numbers = [_cell(row, *field) for field in (("token_ms", 1, 2), ("tokens_a_second", 1, 0), ("cache_bytes", 1e-6, 2))]
        numbers += [_cell(row, *field) for field in (("peak_bytes", 1e-6, 0), ("prompt_s", 1, 2), ("compile_s", 1, 1))]
        numbers[-1] += f" ({row['compile_again_s']:.1f})" if row.get("compile_again_s") is not None else ""
        lines.append(f"| {row['batch']} | {row['context']:,} | {row['case']} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any], field: str, scale: float, digits: int) -> str:
    if row.get("out_of_memory"):
        return "x"
    return "-" if row[field] is None else f"{row[field] * scale:,.{digits}f}"


def draw(rows: list[dict[str, Any]], title: str, target: Path) -> None:
    """Three panels: milliseconds a token and bytes of cache against context at the smallest batch, tokens a second against batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator

    rows = [row for row in rows if not row.get("out_of_memory")]
    smallest, shortest = min(row["batch"] for row in rows), min(row["context"] for row in rows)
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), constrained_layout=True)
    timed = {row["case"] for row in rows}
    for name in filter(timed.__contains__, CASES):
        by_context = [row for row in rows if row["case"] == name and row["batch"] == smallest]
        by_batch = [row for row in rows if row["case"] == name and row["context"] == shortest]
        line = "--" if name.startswith("softmax") else "-"
        wide = {"lw": 4, "alpha": 0.4} if "dynamic" in name else {}  # both caches hold the same: one line would hide the other
        lengths = [row["context"] for row in by_context]
        panels[0].plot(lengths, [row["token_ms"] for row in by_context], line, marker="o", ms=4, label=name)
        panels[1].plot(lengths, [row["cache_bytes"] / 1e6 for row in by_context], line, marker="o", ms=4, **wide)
        panels[2].plot([row["batch"] for row in by_batch], [row["tokens_a_second"] for row in by_batch], line, marker="o", ms=4)
    panels[0].set(title=f"batch {smallest}", xlabel="tokens before", ylabel="ms a token", xscale="log", yscale="log")
    panels[1].set(title=f"batch {smallest}", xlabel="tokens before", ylabel="cache, MB", xscale="log", yscale="log")
    panels[2].set(title=f"{shortest:,} tokens before", xlabel="sequences", ylabel="tokens a second", xscale="log", yscale="log")
    for panel, field in zip(panels, ("context", "context", "batch"), strict=True):
        places = sorted({row[field] for row in rows})
        panel.set_xticks(places, [f"{place:,}" for place in places])
        panel.xaxis.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,g}"))
        panel.yaxis.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def sizes_of(batches: str, contexts: str, most: int) -> list[tuple[int, int]]:
    """Every (batch, context) of no more than so many tokens; nothing where these are no numbers."""
    try:
        every = product(map(int, batches.split(",")), map(int, contexts.split(",")))
        return [(batch, context) for batch, context in every if min(batch, context) > 0 and batch * context <= most]
    except ValueError:
        return []


def write(path: Path, text: str) -> None:
    """As a whole or not at all."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text)
    aside.replace(path)


def arguments_of(line: list[str] | None) -> argparse.Namespace:
    """What is asked for, or one sentence about why it cannot be."""
    parser = argparse.ArgumentParser(description="Time generation beside softmax.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of the model")
    parser.add_argument("--contexts", default="128,1024,4096", help="tokens of the prompt, with commas between")
    parser.add_argument("--batches", default="1,8", help="sequences at once, with commas between")
    parser.add_argument("--most", type=int, default=8192, help="tokens of all prompts, beyond which a context is left out of a batch")
    parser.add_argument("--tokens", type=int, default=24, help=f"new tokens of each call, more than {SETTLED}")
    parser.add_argument("--rounds", type=int, default=2, help="calls of each case, after one that warms up")
    parser.add_argument("--jobs", type=int, default=1, help="cases that warm up and compile side by side")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="some of them, each in quotes")
    parser.add_argument("--out", type=Path, help="a folder for generate-DEVICE.json, .md and .png")
    asked = parser.parse_args(line)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no usable CUDA device: check the driver with nvidia-smi, or take --device cpu.")
    if asked.tokens <= SETTLED:
        parser.error(f"tokens are more than {SETTLED}.")
    asked.sizes = sizes_of(asked.batches, asked.contexts, asked.most)
    if not asked.sizes or min(asked.rounds, asked.jobs) < 1:
        parser.error(f"batches and contexts are whole numbers of which some multiply to 1 to {asked.most:,}, rounds and jobs 1 or more.")
    return asked


def main(line: list[str] | None = None) -> None:
    """Prints each row as it comes; the table is printed at the end, or written into a folder after each row."""
    asked = arguments_of(line)
    name = torch.cuda.get_device_name() if asked.device == "cuda" else "cpu"
    facts = {"device": name, **machine(), "transformers": transformers.__version__, "shape": asked.shape, "new tokens": asked.tokens}
    facts |= {"rounds": asked.rounds, "cases compiled side by side": asked.jobs}
    how = {name: getattr(asked, name) for name in ("cases", "jobs", "shape", "device", "sizes", "tokens", "rounds")}
    rows, path = list[dict[str, Any]](), None if asked.out is None else asked.out / f"generate-{asked.device}"
    for row in all_rows(**how):
        print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
        rows.sort(key=lambda row: (asked.sizes.index((row["batch"], row["context"])), asked.cases.index(row["case"])))
        if path is not None:
            asked.out.mkdir(parents=True, exist_ok=True)
            write(path.with_suffix(".json"), json.dumps({**facts, "shape": SHAPES[asked.shape], "rows": rows}, indent=1) + "\n")
            write(path.with_suffix(".md"), f"{table(facts, rows)}\n![Time, cache and tokens a second]({path.name}.png)\n")
    if path is None:
        print(table(facts, rows))
    elif importlib.util.find_spec("matplotlib") is None:
        print("There is no picture: matplotlib is not installed.")
    else:
        draw(rows, f"generate() on {facts['cpu'] if asked.device == 'cpu' else name}", path.with_suffix(".png"))


if __name__ == "__main__":
    main()
