"""The picture of `results/smollm2.json`: a converted SmolLM2-135M beside its teacher, in loss by position, recall, and bytes of cache.

python benchmarks/smollm2.py [OUTPUT.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

Row = tuple[dict[str, Any], str, str, str]
"""A row of the results, its name in the picture, colour and line."""
RESULTS = Path(__file__).parent / "results"
SHORT = {
    "window 64 + 4, untrained": ("window 64, untrained", "tab:gray", ":"),
    "the paper's function, decay per head": ("paper's function + decay", "tab:red", "-"),
    "window 128 + second degree, every layer": ("window 128 + second degree", "tab:orange", "-"),
    "window 64 + second degree, 4 of 30 layers softmax": ("window 64 + second degree, 4 layers softmax", "tab:blue", "-"),
}


LENGTHS = [2**n for n in range(7, 18)]
WINDOW = 64 + 4  # tokens that the untrained window keeps


def draw(found: dict[str, Any], target: Path) -> None:
    """Three panels side by side."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), constrained_layout=True)
    rows = [(row, *SHORT[row["name"]]) for row in found["rows"] if row["name"] in SHORT]
    for panel, draw_panel in zip(panels, (draw_loss, draw_recall, draw_cache), strict=True):
        draw_panel(panel, found, rows)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
    lines = [Line2D([], [], color="black", ls="--", lw=1, label="teacher")]
    lines += [Line2D([], [], color=colour, ls=line, marker="o", ms=4, label=name) for _, name, colour, line in rows]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(target, dpi=110)


def draw_loss(panel: Axes, found: dict[str, Any], rows: list[Row]) -> None:
    """By the number of tokens before; what is near the teacher once more in an inset."""
    inset = panel.inset_axes((0.42, 0.44, 0.55, 0.31))
    for axes, shown in ((panel, rows), (inset, rows[-2:])):
        for row, _, colour, line in shown:
            axes.plot(found["positions"], row["by_position"], line, marker="o", ms=4, color=colour)
        axes.axhline(0, color="black", ls="--", lw=1)
    panel.set(title="loss above the teacher's", xlabel="tokens before", ylabel="nats a token")
    inset.set_xticks([])
    inset.set_yticks([0, 0.05, 0.1])
    inset.tick_params(labelsize=8)
    inset.grid(alpha=0.3)


def draw_recall(panel: Axes, found: dict[str, Any], rows: list[Row]) -> None:
    """A bar for each model and distance: curves at 0 would hide one another."""
    bars = [(found["teacher_recall"], "white"), *((row["recall"], colour) for row, _, colour, _ in rows)]
    for number, (shares, colour) in enumerate(bars):
        edge, line = ("black", "--") if number == 0 else (colour, "-")
        places = [distance + (number - (len(bars) - 1) / 2) * 0.17 for distance in range(len(shares))]
        drawn = panel.bar(places, shares, 0.15, color=colour, edgecolor=edge, ls=line)
        panel.bar_label(drawn, ["" if share else "0" for share in shares], color=colour, fontsize=8)
    distances = range(len(found["distances"]))
    panel.set(title="digits recalled, generated", xlabel="tokens between", xticks=distances, xticklabels=found["distances"], ylim=(0, 1.1))


def draw_cache(panel: Axes, found: dict[str, Any], rows: list[Row]) -> None:
    """Bytes by the tokens of a sequence; the teacher's and the untrained window's are computed."""
    a_token = found["teacher_bytes_a_token"]
    panel.plot(LENGTHS, [a_token * n / 2**20 for n in LENGTHS], "k--", lw=1)
    for row, _, colour, line in rows:
        state, more = row.get("state", WINDOW * a_token), row.get("bytes_a_token", 0)
        panel.plot(LENGTHS, [(state + more * n) / 2**20 for n in LENGTHS], line, color=colour)
    panel.set(title="cache of one sequence", xlabel="tokens", ylabel="MiB", xscale="log", yscale="log")
    panel.set_xticks([128, 1024, 8192, 65536], ["128", "1k", "8k", "64k"])
    panel.set_yticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1,024"])
    panel.minorticks_off()


if __name__ == "__main__":
    made = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "smollm2.png"
    draw(json.loads((RESULTS / "smollm2.json").read_text(encoding="utf-8")), made)
