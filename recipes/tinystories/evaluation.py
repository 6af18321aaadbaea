"""Models measured on stories: what `recipes.tinystories.evaluate` runs once its arguments are right."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from rich.markup import escape
from rich.progress import track
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hf_linattn
from recipes.common import cli
from recipes.common.errors import RecipeError
from recipes.common.plots import save_figure
from recipes.common.tables import ShownTable
from recipes.common.threads import threads
from recipes.common.tokenizing import load_tokenizer, start_token
from recipes.common.tokens import by_size
from recipes.tinystories.metrics import Prediction
from recipes.tinystories.model import go_on, is_linear, load_model

STEPS_TIMED = 24


def measure(
    named: tuple[str, str],
    texts: Sequence[str],
    prompts: Sequence[str],
    *,
    length: int,
    lengths: Sequence[int],
    tokens: int,
    batch_size: int,
    device: torch.device,
    dtype: str,
) -> dict[str, Any]:
    """Everything that the report says of one model.

    Args:
        named: what to call it, and its folder or hub id.
        texts: the stories to score; prompts: the beginnings to go on from.
        length: tokens at which a story is cut.
        lengths: where decoding is measured.
        tokens: of each continuation.
        dtype: a name in torch.
    """
    name, path = named
    model: Any = load_model(path, dtype=getattr(torch, dtype)).to(device).eval()  # type: ignore[arg-type]
    tokenizer = load_tokenizer(path)
    return {
        "name": name or path,
        "attention": describe(model),
        "parameters": model.num_parameters(),
        **score(model, tokenizer, texts, min(length, _positions(model)), batch_size, name or path),
        "decoding": [decoding(model, n) for n in lengths if n + STEPS_TIMED <= _positions(model) or _rotary(model)],
        "samples": [{"prompt": text, "text": go_on(model, tokenizer, text, tokens)} for text in prompts],
    }


def usable_device(name: str) -> torch.device:
    """The device of this name; by default a GPU if there is one. Raises RecipeError where it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # the device meta can make tensors and not read them
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try cpu") from None
    return device


def machine(device: torch.device) -> dict[str, str]:
    """What the figures were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads()}"
    return {"device": name, "torch": str(torch.__version__)}


@torch.no_grad()
def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, batch_size: int, name: str = ""
) -> dict[str, Any]:
    """Nats a token, bits a byte (`metrics.Prediction`), and loss by position: how many tokens stand before the one predicted."""
    start = start_token(tokenizer)
    rows: list[tuple[list[int], int]] = []
    tokenized = (ids for together in by_size(texts) for ids in tokenizer(together, add_special_tokens=False, verbose=False)["input_ids"])
    for text, ids in zip(texts, tokenized, strict=True):
        kept = ids[: length - 1]
        if kept:
            whole = len(kept) == len(ids)
            rows.append(([start, *kept], len((text if whole else str(tokenizer.decode(kept))).encode())))
    if not rows:
        raise RecipeError("the stories hold no token to predict; give longer text")
    if (top := max(max(ids) for ids, _ in rows)) >= model.config.vocab_size:
        raise RecipeError(
            f"{name}: the tokenizer gives token {top} and the model knows {model.config.vocab_size}; they do not belong together"
        )
    rows.sort(key=lambda row: len(row[0]))
    metric = Prediction(keep_in_memory=True)
    sums, counts = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.float64)
    for begin in track(range(0, len(rows), batch_size), description=escape(f"scoring {name}"), transient=True):
        batch = rows[begin : begin + batch_size]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [start] * (longest - len(row)) for row, _ in batch], device=model.device)
        real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in batch], device=model.device)
        logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
        nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().cpu() * real[:, 1:].cpu()
        metric.add_batch(nats=nats.sum(1).tolist(), tokens=[len(row) - 1 for row, _ in batch], bytes=[size for _, size in batch])
        sums[1:longest] += nats.sum(0)
        counts[1:longest] += real[:, 1:].cpu().sum(0)
    edges = [1] + [2**k for k in range(1, 40) if 2**k < length] + [length]
    by_position = [
        {"from": low, "to": high - 1, "nats_per_token": float(sums[low:high].sum() / n), "tokens": int(n)}
        for low, high in zip(edges, edges[1:], strict=False)
        if (n := float(counts[low:high].sum()))
    ]
    return {**(metric.compute() or {}), "tokens": int(counts.sum()), "by_position": by_position}


@torch.no_grad()
def decoding(model: PreTrainedModel, length: int) -> dict[str, float]:
    """After `length` tokens: bytes of the cache, and the median milliseconds of one more token (one sequence)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    size = hf_linattn.cache_bytes(cache)
    times = []
    for _ in range(STEPS_TIMED):
        began = time.perf_counter()
        cache = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).past_key_values
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        times.append(time.perf_counter() - began)
    return {"length": length, "cache_bytes": size, "ms_per_token": round(1000 * statistics.median(times), 3)}


def describe(model: PreTrainedModel) -> str:
    """The model's attention in a few words."""
    if not is_linear(model):
        return "softmax"
    options = hf_linattn.LinAttnConfig.of(model.config)
    words = [options.attention.describe(options.learnable)]
    if kept := options.softmax_layers:
        words.append(f"softmax in {len(kept)} of {model.config.num_hidden_layers} layers")
    return ", ".join(words)


def markdown(conditions: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """The report as Markdown."""
    lines = ["# Evaluation", "", "; ".join(f"{key}: {value}" for key, value in conditions.items()) + "."]
    for heading, rows in _tables(conditions, results):
        lines += ["", f"## {heading}", "", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows[1:]]
    lines += ["", "## Continuations"]
    for sample in range(len(results[0]["samples"])):
        lines += ["", f"**{_inline(results[0]['samples'][sample]['prompt'])}** ...", ""]
        lines += [f"- {result['name']}: {_inline(result['samples'][sample]['text'])}" for result in results]
    return "\n".join(lines) + "\n"


def show(conditions: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """The report on the screen."""
    console = cli.console()
    for heading, rows in _tables(conditions, results):
        numbers_from = 2 if rows[0][1] == "attention" else 1
        console.print(ShownTable(rows, heading, right=range(numbers_from, len(rows[0]))))
    for sample in range(len(results[0]["samples"])):
        console.print(f"\n{_line(results[0]['samples'][sample]['prompt'])} ...", style="bold")
        for result in results:
            console.print(f"  {result['name']}: {_line(result['samples'][sample]['text'])}")
    console.print(f"\n{conditions['stories']} stories, {conditions['dtype']}, {conditions['device']}")


def draw(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Loss by position, bytes of the cache and time a token by length, one line a model."""
    figure, (loss, size, speed) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for result in results:
        where = [(x["from"] * x["to"]) ** 0.5 for x in result["by_position"]]  # the middle of each span on a logarithmic axis
        loss.plot(where, [x["nats_per_token"] for x in result["by_position"]], marker="o", markersize=3, label=result["name"])
        lengths = [x["length"] for x in result["decoding"]]
        size.plot(lengths, [x["cache_bytes"] / 1024 for x in result["decoding"]], marker="o", label=result["name"])
        speed.plot(lengths, [x["ms_per_token"] for x in result["decoding"]], marker="o", label=result["name"])
    loss.set(xlabel="tokens before", ylabel="nats a token", title="loss by position", xscale="log")
    size.set(xlabel="tokens so far", ylabel="KiB", title="cache", xscale="log", yscale="log")
    speed.set(xlabel="tokens so far", ylabel="ms a token", title="decoding", xscale="log", ylim=(0, None))
    ticks = sorted({x["length"] for result in results for x in result["decoding"]})
    for axes in (size, speed):
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.minorticks_off()
    for axes in (loss, size, speed):
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def _tables(conditions: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[tuple[str, list[list[str]]]]:
    summary = [["model", "attention", "parameters", "loss, nats a token", "bits a byte"]]
    for x in results:
        error = f"{x['nats_per_token']:.4f} ± {x['nats_per_token_error']:.4f}"
        summary.append([x["name"], x["attention"], f"{x['parameters']:,}", error, f"{x['bits_per_byte']:.4f}"])
    spans = max((x["by_position"] for x in results), key=len)
    position = [["tokens before", *(x["name"] for x in results)]]
    for number, span in enumerate(spans):
        losses = [f"{x['by_position'][number]['nats_per_token']:.3f}" if number < len(x["by_position"]) else "-" for x in results]
        position.append([f"{span['from']}-{span['to']}" if span["to"] > span["from"] else str(span["from"]), *losses])
    decoding = [["model", "tokens so far", "cache, bytes", "ms a token"]]
    decoding += [
        [x["name"], f"{y['length']:,}", f"{y['cache_bytes']:,}", f"{y['ms_per_token']:.2f}"] for x in results for y in x["decoding"]
    ]
    tables = [
        (f"Loss on {conditions['stories']} stories of {conditions['data']}", summary),
        ("Loss on them in nats a token, by the number of tokens before the one predicted", position),
        ("Generating, one sequence of random tokens", decoding),
    ]
    return [(heading, rows) for heading, rows in tables if len(rows) > 1]


def _line(text: str) -> str:
    return " ".join(text.split())


def _inline(text: str) -> str:
    return _line(text).replace("|", "\\|").replace("[", "\\[")


def _positions(model: PreTrainedModel) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)


def _rotary(model: PreTrainedModel) -> bool:
    """Whether positions beyond the trained ones can be computed at all, which is enough to measure time and bytes."""
    return bool(getattr(model.config, "rope_parameters", None))
