"""The picture of `results/smollm2.json`: a converted SmolLM2-135M beside its teacher, in loss by position, recall, and bytes of
cache. A student of several seeds is drawn as their mean.

python benchmarks/smollm2.py [OUTPUT.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

Row = tuple[dict[str, Any], str, str, str]
"""A row of the results, its name in the picture, colour and line."""
RESULTS = Path(__file__).parent / "results"
SHORT = {
    "window 64 + 4, untrained": ("window 64, untrained", "tab:gray", ":"),
    "second degree, every layer": ("second degree", "tab:red", "-"),
    "window 128 alone, every layer": ("window 128", "gold", "-"),
    "window 128 + second degree, every layer": ("window 128 + second degree", "tab:orange", "-"),
    "window 64 alone, 4 of 30 layers softmax": ("window 64, 4 layers softmax", "skyblue", "--"),
    "window 64 + second degree, 4 of 30 layers softmax": ("window 64 + second degree, 4 layers softmax", "tab:blue", "-"),
}
"""Dashes lie over the line that they would otherwise hide."""
LENGTHS = [2**n for n in range(7, 18)]
WINDOW = 64 + 4  # tokens that the untrained window keeps


def draw(found: dict[str, Any], target: Path) -> None:
    """Three panels side by side."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), constrained_layout=True, width_ratios=(1, 1.35, 1))
    rows = [(mean_of_seeds(found["rows"], name), *shown) for name, shown in SHORT.items()]
    for panel, draw_panel in zip(panels, (draw_loss, draw_recall, draw_cache), strict=True):
        draw_panel(panel, found, rows)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
    lines = [Line2D([], [], color="black", ls="--", lw=1, label="teacher")]
    lines += [Line2D([], [], color=colour, ls=line, marker="o", ms=4, label=name) for _, name, colour, line in rows]
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(target, dpi=110)


def mean_of_seeds(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """What is drawn of one kind of student."""
    seeds = [row for row in rows if row["name"] == name]
    columns = {
        "by_position": [row["by_position"]["wikitext2"] for row in seeds],
        "recall": [row["recall"]["needle"] for row in seeds],
    }
    return seeds[0] | {key: [mean(values) for values in zip(*column, strict=True)] for key, column in columns.items()}


def draw_loss(panel: Axes, found: dict[str, Any], rows: list[Row]) -> None:
    """On WikiText-2, where students are further from their teacher than on articles, by the number of tokens before."""
    for row, _, colour, line in rows:
        panel.plot(found["positions"], row["by_position"], line, marker="o", ms=4, color=colour, zorder=3 if line == "--" else 2)
    panel.axhline(0, color="black", ls="--", lw=1)
    panel.set(title="loss above the teacher's, WikiText-2", xlabel="tokens before", ylabel="nats a token")


def draw_recall(panel: Axes, found: dict[str, Any], rows: list[Row]) -> None:
    """A bar for each model and distance: curves at 0 would hide one another."""
    bars = [(found["teacher_recall"]["needle"], "white"), *((row["recall"], colour) for row, _, colour, _ in rows)]
    width = 0.88 / len(bars)
    for number, (shares, colour) in enumerate(bars):
        edge, line = ("black", "--") if number == 0 else (colour, "-")
        places = [distance + (number - (len(bars) - 1) / 2) * width for distance in range(len(shares))]
        drawn = panel.bar(places, shares, 0.85 * width, color=colour, edgecolor=edge, ls=line)
        panel.bar_label(drawn, ["" if share else "0" for share in shares], color=colour, fontsize=7)
    labels = [f"{distance:,}" for distance in found["distances"]]
    panel.set(title="a number recalled, generated", xlabel="tokens between", ylim=(0, 1.1))
    panel.set_xticks(range(len(labels)), labels)


def draw_cache(panel: Axes, found: dict[str, Any], rows: list[Row]) -> None:
    """Bytes by the tokens of a sequence; the teacher's and the untrained window's are computed."""
    a_token = found["teacher_bytes_a_token"]
    panel.plot(LENGTHS, [a_token * n / 2**20 for n in LENGTHS], "k--", lw=1)
    for row, _, colour, line in rows:
        state, more = row.get("state", WINDOW * a_token), row.get("bytes_a_token", 0)
        panel.plot(LENGTHS, [(state + more * n) / 2**20 for n in LENGTHS], line, color=colour, zorder=3 if line == "--" else 2)
    panel.set(title="cache of one sequence", xlabel="tokens", ylabel="MiB", xscale="log", yscale="log")
    panel.set_xticks([128, 1024, 8192, 65536], ["128", "1k", "8k", "64k"])
    panel.set_yticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1,024"])
    panel.minorticks_off()


if __name__ == "__main__":
    made = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "smollm2.png"
    draw(json.loads((RESULTS / "smollm2.json").read_text(encoding="utf-8")), made)
