"""A training step of TinyLlama-1.1B's shape on a GPU: tokens a second and peak memory with linear attention, SDPA and FLA's operator.

    python benchmarks/training.py [--out benchmarks/results] [--lengths 8x2048,1x16384,1x65536] [--forms linattn,sdpa,fla]

The model is Transformers' Llama with 22 layers, 2,048 wide, 32 query heads on 4 key heads, random weights in bfloat16; the step is
forward, loss, backward and AdamW (fused), nothing compiled. From 65,536 tokens on, gradient checkpointing. Only `attn_implementation`
differs. Each form and length runs in a process of its own, so that none inherits another's memory.
"""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from gpu import machine, markdown
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

import hf_linattn  # noqa: F401  (registers "linattn")

CHECKPOINTED_FROM = 65536
FORMS = {
    "linattn": "linattn",
    "linattn decay": "linattn, a decay per head",
    "linattn noise": "linattn, noise dropout 0.1",
    "sdpa": "sdpa",
    "fla": "FLA fused_chunk_linear_attn, not normalised",
}


def fla_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object) -> tuple:
    """FLA's operator as Transformers calls attention; it has no grouped queries, so key and value are repeated for it."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    out = importlib.import_module("fla.ops.linear_attn").fused_chunk_linear_attn(q, k, v, normalize=False)
    return (out[0] if isinstance(out, tuple) else out), None


def tinyllama(form: str, length: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        max_position_embeddings=max(2048, length), use_cache=False,
    )  # fmt: skip
    if form == "linattn decay":
        config.linattn = {"decay": "head"}
    if form == "linattn noise":
        config.linattn = {"dropout": 0.1}
    AttentionInterface.register("fla", fla_attention)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=form.split()[0])
    if length >= CHECKPOINTED_FROM:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def measure(form: str, batch: int, length: int, steps: int = 6) -> dict:
    """Median seconds of a step, after two to warm up."""
    model = tinyllama(form, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(0, 32000, (batch, length), device="cuda")
    seconds = []
    for step in range(steps + 2):
        if step == 2:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds[2:])
    return {
        "form": form, "batch": batch, "length": length, "seconds": middle, "tokens_per_second": batch * length / middle,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "loss": float(loss.detach()),
    }  # fmt: skip


def in_a_process(form: str, batch: int, length: int) -> dict:
    command = [sys.executable, __file__, "--only", json.dumps([form, batch, length])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1][:200]
        print(f"{form} at {batch}x{length}: {reason}", file=sys.stderr)
        return {"form": form, "batch": batch, "length": length, "refused": reason}
    row = json.loads(done.stdout.strip().splitlines()[-1])
    speed, memory = f"{row['tokens_per_second']:,.0f} tokens/s", f"{row['peak_gib']:.1f} GiB"
    print(f"{form} at {batch}x{length}: {speed}, {memory}", file=sys.stderr, flush=True)
    return row


def table_of(rows: list[dict], shapes: list[tuple[int, int]]) -> list[list[str]]:
    found = {(row["form"], row["batch"], row["length"]): row for row in rows}
    header = ["", *(f"{batch} x {length:,}" for batch, length in shapes)]
    lines = []
    for form in dict.fromkeys(row["form"] for row in rows):
        cells = []
        for shape in shapes:
            row = found[(form, *shape)]
            cells.append("-" if "refused" in row else f"{row['tokens_per_second']:,.0f} · {row['peak_gib']:.1f}")
        lines.append([FORMS[form], *cells])
    return [header, *lines]


def main(
    out: Annotated[Path | None, typer.Option(help="A folder for the results as Markdown and JSON.")] = None,
    lengths: Annotated[str, typer.Option(help="Batches times lengths, separated by commas.")] = "8x2048,1x16384,1x65536",
    forms: Annotated[str, typer.Option(help=f"Which of {', '.join(FORMS)}.")] = ",".join(FORMS),
    only: Annotated[str | None, typer.Option(hidden=True, help="One case, in this process: [form, batch, length].")] = None,
) -> None:
    """Time a training step of TinyLlama-1.1B's shape."""
    if only is not None:
        print(json.dumps(measure(*json.loads(only))))
        return
    shapes = [(int(batch), int(length)) for batch, length in (pair.split("x") for pair in lengths.split(","))]
    about = machine()
    rows = [in_a_process(form, *shape) for shape in shapes for form in forms.split(",")]
    header, *lines = table_of(rows, shapes)
    title = "A training step of TinyLlama-1.1B's shape (32:4 heads, bfloat16, AdamW): tokens/s · peak GiB"
    shown = Table(*header, title=title)
    for line in lines:
        shown.add_row(*line)
    Console(width=150).print(shown)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "training.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1))
        conditions = ", ".join(f"{name} {value}" for name, value in about.items())
        (out / "training.md").write_text(f"# Training on a GPU\n\n{title}. {conditions}.\n\n" + markdown([header, *lines]) + "\n")


if __name__ == "__main__":
    typer.run(main)
