"""The picture of `results/smollm2.json`: a converted SmolLM2-135M beside its teacher, in loss by position, recall, and bytes of cache.

python benchmarks/smollm2.py [OUTPUT.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
SHORT = {
    "window 64 + 4, untrained": ("window 64, untrained", "tab:gray", ":"),
    "the paper's function, decay per head": ("paper's function + decay", "tab:red", "-"),
    "window 128 + second degree, every layer": ("window 128 + second degree", "tab:orange", "-"),
    "window 64 + second degree, 4 of 30 layers softmax": ("window 64 + second degree, 4 layers softmax", "tab:blue", "-"),
}


def draw(found: dict[str, Any], target: Path) -> None:
    """Three panels side by side."""
    figure, (loss, recall, cache) = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    rows = [(row, *SHORT[row["name"]]) for row in found["rows"] if row["name"] in SHORT]
    for row, name, colour, line in rows:
        loss.plot(found["positions"], row["by_position"], line, marker="o", ms=4, color=colour, label=name)
        recall.plot(range(4), row["recall"], line, marker="o", ms=4, color=colour)
    loss.axhline(0, color="black", lw=1)
    loss.set(title="loss above the teacher's", xlabel="tokens before", ylabel="nats a token")
    recall.plot(range(4), found["teacher_recall"], "k--", marker="s", ms=4, lw=1, label="teacher")
    recall.set(
        title="digits recalled, generated", xlabel="tokens between", xticks=range(4), xticklabels=found["distances"], ylim=(-0.05, 1.1)
    )
    lengths = [2**n for n in range(7, 18)]
    cache.plot(lengths, [found["teacher_bytes_a_token"] * n / 2**20 for n in lengths], "k--", lw=1)
    for row, _, colour, _ in rows:
        if "state" in row:
            cache.plot(lengths, [(row["state"] + row["bytes_a_token"] * n) / 2**20 for n in lengths], color=colour)
    cache.set(title="cache of one sequence", xlabel="tokens", ylabel="MiB", xscale="log", yscale="log")
    cache.set_xticks([128, 1024, 8192, 65536], ["128", "1k", "8k", "64k"])
    cache.set_yticks([4, 16, 64, 256, 1024], ["4", "16", "64", "256", "1,024"])
    cache.minorticks_off()
    handles = [*loss.get_legend_handles_labels()[0], recall.get_lines()[-1]]
    figure.legend(handles, [*(name for _, name, _, _ in rows), "teacher"], loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    for panel in (loss, recall, cache):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    made = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "smollm2.png"
    draw(json.loads((RESULTS / "smollm2.json").read_text(encoding="utf-8")), made)
