"""The pictures of an evaluation, each one question: what a reader would ask of the table, answered at a glance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from convert.evaluation.curves import Curves
from convert.evaluation.tables import Results
from recipes.common.plots import save_figure

_SIZE = (7.5, 4.4)
# As they are learned, and as a reader thinks of them.
_SHOWN: dict[str, tuple[str, Callable[[float], float], bool]] = {
    "log_decay": ("time constant, tokens", lambda rate: -1 / min(rate, -1e-9), True),
    "gate": ("share of the window", lambda share: share, False),
}


def draw_all(folder: Path, results: Results, curves: Curves, ranking: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Draws what there is something to draw of into PNGs.

    Returns:
        Each picture's file name and a sentence that says what it shows.
    """
    drawn = [*_losses(folder, results), *_recall(folder, results), *_training(folder, curves), *_layers(folder, curves)]
    if ranking:
        drawn.append(draw_ranking(folder / "ranking.png", ranking))
    return [*drawn, *_learned(folder, results)]


def draw_ranking(path: Path, ranking: dict[str, Any]) -> tuple[str, str]:
    """How much each layer matters, from the JSON of convert.select_layers."""
    layers = ranking["layers"]
    figure, axes = plt.subplots(2, 1, figsize=(_SIZE[0], 5.6), layout="constrained", sharex=True)
    where, chosen = [one["layer"] for one in layers], set(ranking["chosen"])
    colours = ["tab:orange" if layer in chosen else "tab:gray" for layer in where]
    titles = {"kl": "KL to the teacher, nats", "key_nats": "key: nats a token above the teacher's"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        floor = ranking["teacher"].get(key, 0.0)
        axis.bar(where, [one[key] - floor for one in layers], color=colours)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3, axis="y")
    axes[1].set_xlabel("the one layer that is put under a window (orange: chosen to stay softmax)")
    save_figure(figure, path)
    return path.name, "How much is lost where one layer alone sees a window: layers that carry loss, and layers that carry recall."


def _losses(folder: Path, results: Results) -> list[tuple[str, str]]:
    teacher_name, teacher = next(iter(results.items()))
    drawn = []
    for key in (key for key in teacher if key.startswith("loss-")):
        truth = teacher[key]["by_position"]
        figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
        for name, found in results.items():
            if name != teacher_name:
                above = [span["nats"] - true["nats"] for span, true in zip(found[key]["by_position"], truth, strict=True)]
                axes.plot(range(len(truth)), above, marker="o", label=name)
        axes.axhline(0, color="black", linewidth=1, label=teacher_name)
        axes.set_xticks(range(len(truth)), [f"{span['from']:,}-{span['to'] - 1:,}" for span in truth])
        axes.set(xlabel="tokens before the one predicted", ylabel="nats a token above the teacher", title=teacher[key]["text"])
        _finish(axes)
        save_figure(figure, folder / f"{key}.png")
        drawn.append((f"{key}.png", f"Loss above the teacher's by position, on {teacher[key]['text']}: lower is better, 0 is the teacher."))
    return drawn


def _recall(folder: Path, results: Results) -> list[tuple[str, str]]:
    kinds = [key for key in next(iter(results.values())) if key.startswith("recall-")]
    if not kinds:
        return []
    size = (max(3.6 * len(kinds), _SIZE[0]), 4.4)
    figure, grid = plt.subplots(1, len(kinds), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, key in zip(grid[0], kinds, strict=True):
        for index, (name, found) in enumerate(results.items()):
            points = [(int(at), one["right"], one["right_error"]) for at, one in found[key]["by_distance"].items()]
            style = {"color": "black", "linestyle": "--"} if index == 0 else {}
            axes.errorbar(*zip(*points, strict=True), marker="o", markersize=3, capsize=2, label=name, **style)  # type: ignore[misc, arg-type]
        axes.set(xscale="log", xlabel="tokens back", title=key.removeprefix("recall-"), ylim=(-0.03, 1.03))
        axes.set_xticks([int(at) for at in found[key]["by_distance"]], [f"{int(at):,}" for at in found[key]["by_distance"]])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("whole answers right")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(results), 3), fontsize="small")
    save_figure(figure, folder / "recall.png")
    return [("recall.png", "Recall by generated tokens at each distance; bars are one standard error.")]


def _training(folder: Path, curves: Curves) -> list[tuple[str, str]]:
    drawn = []
    for key, title in (("above_teacher", "loss above the teacher's"), ("kl", "KL to the teacher"), ("error", "error of attention")):
        lines = {name: by_key[key] for name, by_key in curves.by_tokens.items() if by_key.get(key)}
        if lines:
            figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
            for name, points in lines.items():
                axes.plot([tokens / 1e6 for tokens, _ in points], [value for _, value in points], marker="o", markersize=3, label=name)
            axes.set(xlabel="million tokens trained", ylabel=f"{title}, held out")
            _finish(axes)
            save_figure(figure, folder / f"training-{key}.png")
            drawn.append((f"training-{key}.png", f"While training: {title}, by tokens."))
    return drawn


def _layers(folder: Path, curves: Curves) -> list[tuple[str, str]]:
    if not curves.by_layer:
        return []
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    for name, (first, last) in curves.by_layer.items():
        line = axes.plot(range(len(last)), last, marker="o", markersize=3, label=f"{name}, at the end")[0]
        axes.plot(range(len(first)), first, linestyle=":", color=line.get_color(), label=f"{name}, at first")
    axes.set(xlabel="linear layer, from the first", ylabel="error of attention, of its mean square", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes)
    save_figure(figure, folder / "layers.png")
    return [("layers.png", "Error of each linear layer's output, fed what the teacher's layer is fed.")]


def _learned(folder: Path, results: Results) -> list[tuple[str, str]]:
    drawn = []
    for number, (name, found) in enumerate(results.items()):
        shown = {key: values for key, values in found["model"]["learned"].items() if _varies(values)}
        if shown:
            figure, grid = plt.subplots(1, len(shown), figsize=(max(3.8 * len(shown), _SIZE[0]), 4), layout="constrained", squeeze=False)
            for axes, (key, values) in zip(grid[0], shown.items(), strict=True):
                title, as_read, log = _SHOWN.get(key, (key, lambda value: value, False))
                for layer, heads in values:
                    axes.plot([layer] * len(heads), [as_read(value) for value in heads], ".", color="tab:blue", alpha=0.6)
                axes.set(xlabel="layer", ylabel=title, yscale="log" if log else "linear")
                axes.yaxis.set_major_formatter("{x:,g}")
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.grid(alpha=0.3)
            figure.suptitle(name)
            save_figure(figure, folder / f"learned-{number}.png")
            drawn.append((f"learned-{number}.png", f"What the heads of {name} have learned, a dot each."))
    return drawn


def _varies(values: Sequence[tuple[int, list[float]]]) -> bool:
    numbers = [value for _, heads in values for value in heads]
    return all(map(math.isfinite, numbers)) and max(numbers) - min(numbers) > 1e-6


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
