"""Curves as a PNG, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.scale import LogTransform
from matplotlib.ticker import FuncFormatter, LogFormatter, LogLocator, NullFormatter

from recipes.common.files import staged_file

matplotlib.rcParams["text.parse_math"] = False  # names of runs stand in the legends, and may hold any letter


def plot_curves(
    path: str | Path, curves: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, title: str = "", log_x: bool = False
) -> None:
    """Draw each named list of (x, y) points as a line, into the PNG `path`; a list of one point is drawn as a dot."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 40 else "", markersize=3)
    axes.set(xlabel=x, ylabel=y, title=title)
    if log_x:
        axes.set_xscale("log", base=2)
    if any(curves.values()):
        axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure: plt.Figure, path: str | Path) -> None:
    """Write `figure` to the PNG `path`, whole or not at all, and close it."""
    for axes in figure.axes:
        _write_numbers(axes.xaxis)
        _write_numbers(axes.yaxis)
    with staged_file(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
    plt.close(figure)


def _write_numbers(axis: Axis) -> None:
    """Of a logarithmic axis in figures: Matplotlib would write powers of ten as formulas, which are not looked for in texts here."""
    if not isinstance(axis.get_major_formatter(), LogFormatter):
        return
    scale = axis.get_transform()
    if isinstance(axis.get_major_locator(), LogLocator) and isinstance(scale, LogTransform) and scale.base == 10:
        axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,g}"))
    axis.set_minor_formatter(NullFormatter())
