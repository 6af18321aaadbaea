"""Training runs side by side: loss against steps and against seconds of training, and a table.

    python -m recipes.tinystories.compare RUN [RUN ...] [--out DIR]

RUN is a run's folder, or NAME=FOLDER. Writes comparison.md, comparison.json and comparison.png into DIR. Seconds are those of training
itself: evaluation, samples and checkpoints are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from recipes.common import cli
from recipes.common.errors import RecipeError, stage
from recipes.common.files import check_target, staged_directory, write_json, write_text
from recipes.common.reading import read_yaml
from recipes.common.state import number, read_records
from recipes.common.tables import ShownTable

COMMAND = "recipes.tinystories.compare"
TITLES = ["run", "attention", "noise", "steps", "tokens", "cross-entropy, nats a token", "tokens a second", "minutes"]


def main(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs, or NAME=FOLDER.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("out/comparison"),
    overwrite: cli.Overwrite = False,
) -> None:
    """Compare training runs by loss, steps and time."""
    inputs = [named_folder(run)[1] for run in runs]
    check_target(out, COMMAND, overwrite=overwrite, inputs=inputs)
    read = [read_run(run) for run in runs]
    rows = [[str(run[key]) for key in ("name", "attention", "noise", "steps")] + _figures(run) for run in read]
    with staged_directory(out, COMMAND, overwrite=overwrite, inputs=inputs) as place:
        lines = ["| " + " | ".join(row) + " |" for row in [TITLES, ["---"] * len(TITLES), *rows]]
        write_text(place / "comparison.md", "\n".join(lines) + "\n")
        write_json(place / "comparison.json", read)
        draw(place / "comparison.png", read)
    cli.console().print(ShownTable([TITLES, *rows]))


def named_folder(named: str) -> tuple[str, Path]:
    """NAME and FOLDER of NAME=FOLDER; the name is empty where there is none."""
    name, _, path = named.rpartition("=") if not Path(named).exists() else ("", "", named)
    return name, Path(path)


def read_run(named: str) -> dict[str, Any]:
    """A run's settings in short, its last figures, and its validation losses as (step, seconds, nats a token)."""
    name, folder = named_folder(named)
    if not (folder / "config.yaml").is_file():
        raise RecipeError(f"{folder} holds no config.yaml, so it is not a run's folder; give the output of a training run")
    with stage(f"reading config.yaml and metrics.jsonl of {folder}", "give the output of a training run"):
        return {"name": name or folder.name, **_last_figures(folder)}


def _last_figures(folder: Path) -> dict[str, Any]:
    settings, metrics = read_yaml(folder / "config.yaml"), folder / "metrics.jsonl"
    if not isinstance(settings, dict):
        raise RecipeError(f"{folder / 'config.yaml'} holds no settings; give the output of a training run")
    records = list(read_records(metrics))
    valid = [[number(r, key, metrics) for key in ("step", "seconds", "valid_loss")] for r in records if r.get("valid_loss") is not None]
    trained = [r for r in records if "tokens" in r]
    if not valid or not trained:
        raise RecipeError(f"{folder} has no validation loss yet; let the run reach its first evaluation")
    return {
        "attention": settings.get("attn_implementation") or "as the checkpoint says",
        "noise": settings.get("noise"),
        "steps": trained[-1]["step"],
        "tokens": number(trained[-1], "tokens", metrics),
        "cross_entropy": valid[-1][2],
        "tokens_per_second": number(trained[-1], "tokens_per_second", metrics),
        "minutes": number(trained[-1], "seconds", metrics) / 60,
        "validation": valid,
    }


def draw(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Validation loss against steps, and against seconds of training."""
    from matplotlib import pyplot as plt  # late, as it takes a second

    from recipes.common.plots import save_figure

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for run in runs:
        for axis, column in zip(axes, (0, 1), strict=True):
            axis.plot([x[column] for x in run["validation"]], [x[2] for x in run["validation"]], label=run["name"])
    axes[0].set(xlabel="steps", ylabel="cross-entropy, nats a token")
    axes[1].set(xlabel="seconds of training")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    save_figure(figure, path)


def _figures(run: dict[str, Any]) -> list[str]:
    return [f"{run['tokens']:,}", f"{run['cross_entropy']:.4f}", f"{run['tokens_per_second']:,.0f}", f"{run['minutes']:.1f}"]


if __name__ == "__main__":
    cli.run(main)
