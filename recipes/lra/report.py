"""Gather finished runs into table 1: python -m recipes.lra.report RUNS... --out FOLDER

RUNS are result.json files, or folders in which to look for them. The table has a row for each kind of attention and dropout, mean and
deviation over the seeds, beside the published rows of the small configuration; it is printed and written as table.md, table.json and
table.png.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from recipes.common import cli, state
from recipes.common.errors import RecipeError
from recipes.common.files import check_target, staged_directory, write_json, write_text
from recipes.common.reading import read_json

COMMAND = "recipes.lra.report"
COLUMNS = {"listops": "ListOps", "text": "Text", "retrieval": "Retrieval", "image": "Image", "pathfinder": "Pathfinder", "pathx": "Path-X"}

# Test accuracies in per cent of models with 2 layers, 64 wide, 2 heads: Xiong et al. 2021 (Nystromformer), Chen et al. 2021 (Skyformer).
PUBLISHED = {
    "softmax": {"listops": 38.37, "text": 61.95, "retrieval": 80.69, "image": 40.57, "pathfinder": 65.26},
    "Performer": {"listops": 38.02, "text": 64.19, "retrieval": 80.04, "image": 41.43, "pathfinder": 66.30},
    "Nystromformer": {"listops": 38.51, "text": 64.83, "retrieval": 80.52, "image": 41.30, "pathfinder": 69.48},
}
ORDER = ["softmax, dropout", "softmax", "linear", "linear, noise"]


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or result.json files.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder of the table.")] = Path("out/lra/report"),
    overwrite: cli.Overwrite = False,
) -> None:
    """Gather finished runs into one table."""
    files = result_files(runs)
    check_target(out, COMMAND, overwrite=overwrite, inputs=files)
    table = gather(read_results(files))
    text = to_markdown(table)
    with staged_directory(out, COMMAND, overwrite=overwrite, inputs=files) as place:
        write_text(place / "table.md", text)
        write_json(place / "table.json", table)
        plot(table, place / "table.png")
    print(text)
    print(f"written to {out}")


def result_files(runs: list[Path]) -> list[Path]:
    """Every result.json at or under `runs`, each once. Raises RecipeError where a path is missing or holds none."""
    files: dict[Path, None] = {}
    for path in runs:
        if not path.exists():
            raise RecipeError(f"{path}: no such file or folder; name the folders that recipes.lra.train wrote")
        found = [path] if path.is_file() else sorted(path.rglob("result.json"))
        if not found:
            raise RecipeError(f"{path}: no result.json in it, so no run there is finished; go on with recipes.lra.train --resume")
        files.update(dict.fromkeys(file.resolve() for file in found))
    return list(files)


def read_results(files: list[Path]) -> list[dict[str, Any]]:
    """What `files` hold. Raises RecipeError where one is no result."""
    return [read_result(file) for file in files]


def read_result(path: Path) -> dict[str, Any]:
    """A result.json of recipes.lra.train.

    Raises RecipeError where it is none."""
    result = read_json(path)
    wanted = ("task", "attn_implementation", "dropout", "seed", "test_accuracy")
    missing = [key for key in wanted if not (isinstance(result, dict) and key in result)]
    if missing:
        raise RecipeError(f"{path}: {', '.join(missing)} is missing; expected a result.json of recipes.lra.train")
    kinds = {"task": str, "attn_implementation": str, "dropout": str, "seed": int, "linattn": dict | None}
    if wrong := [key for key, kind in kinds.items() if not isinstance(result.get(key), kind)]:
        raise RecipeError(f"{path}: {wrong[0]} is {result[wrong[0]]!r:.50}; expected a result.json of recipes.lra.train")
    for key in ("test_accuracy", "steps", "seconds"):
        state.number({key: 0} | result, key, path)
    return result


def row_of(result: dict[str, Any]) -> str:
    """The table's row: kind of attention, options of linattn that are not the defaults, dropout."""
    if result["attn_implementation"] != "linattn":
        return "softmax" + (", dropout" if result["dropout"] == "standard" else "")
    from hf_linattn import LinAttnConfig  # late, since importing torch takes seconds

    options = LinAttnConfig(**(result.get("linattn") or {}))
    return options.attention.describe(options.learnable) + (", noise" if result["dropout"] == "noise" else "")


def gather(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """row -> task -> mean and deviation (None for one seed) of the test accuracy in per cent, seeds, mean steps and seconds.

    Raises RecipeError where one row, task and seed stands in two results."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        group = groups[row_of(result), result["task"]]
        if any(other["seed"] == result["seed"] for other in group):
            raise RecipeError(
                f"two results are of {row_of(result)} on {result['task']} with seed {result['seed']}; name the folders of one set of runs"
            )
        group.append(result)
    table: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row, task in sorted(groups, key=lambda key: (ORDER.index(key[0]) if key[0] in ORDER else len(ORDER), key)):
        group = groups[row, task]
        accuracies = [100 * result["test_accuracy"] for result in group]
        table[row][task] = {
            "mean": float(np.mean(accuracies)),
            "deviation": float(np.std(accuracies, ddof=1)) if len(group) > 1 else None,
            "seeds": sorted(result["seed"] for result in group),
            "steps": float(np.mean([result.get("steps", 0) for result in group])),
            "seconds": float(np.mean([result.get("seconds", 0.0) for result in group])),
        }
    return dict(table)


def mean_over(cells: dict[str, float], tasks: list[str]) -> float | None:
    """The mean over `tasks`, None where one is missing."""
    return float(np.mean([cells[task] for task in tasks])) if tasks and all(task in cells for task in tasks) else None


def to_markdown(table: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table with the published rows; the mean is over the tasks that every row of ours has and that are published."""
    tasks = [task for task in COLUMNS if any(task in cells for cells in table.values())]
    tasks += sorted({task for cells in table.values() for task in cells} - set(COLUMNS))
    shared = [task for task in tasks if all(task in cells for cells in table.values()) and task in PUBLISHED["softmax"]]
    lines = [
        "| test accuracy, % | " + " | ".join(COLUMNS.get(task, task) for task in tasks) + f" | mean of {len(shared)} |",
        "|---" * (len(tasks) + 2) + "|",
    ]
    for row, cells in table.items():
        mean = mean_over({task: cell["mean"] for task, cell in cells.items()}, shared)
        lines.append(f"| {row} | " + " | ".join(_cell(cells.get(task)) for task in tasks) + f" | {_number(mean)} |")
    for row, published in PUBLISHED.items():
        values = " | ".join(_number(published.get(task)) for task in tasks)
        lines.append(f"| *published: {row}* | {values} | {_number(mean_over(published, shared))} |")
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    return f"{cell['mean']:.2f}" + (f" ± {cell['deviation']:.2f} ({len(cell['seeds'])})" if cell["deviation"] is not None else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def plot(table: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Bars of each row for each task, the published softmax as a line across."""
    from recipes.common.plots import plt, save_figure

    tasks = [task for task in COLUMNS if any(task in cells for cells in table.values())]
    figure, axes = plt.subplots(figsize=(1.5 + 1.5 * max(len(tasks), 2), 4.2), layout="constrained")
    width = 0.8 / max(len(table), 1)
    for place, (row, cells) in enumerate(table.items()):
        at = [number + (place - (len(table) - 1) / 2) * width for number, task in enumerate(tasks) if task in cells]
        here = [cells[task] for task in tasks if task in cells]
        axes.bar(at, [cell["mean"] for cell in here], width, label=row)
        for x, cell in zip(at, here, strict=True):
            if cell["deviation"] is not None:
                axes.errorbar(x, cell["mean"], cell["deviation"], fmt="none", ecolor="black", capsize=2)
    for number, task in enumerate(tasks):
        if task in PUBLISHED["softmax"]:
            label = "published softmax" if number == 0 else ""
            axes.hlines(PUBLISHED["softmax"][task], number - 0.42, number + 0.42, colors="black", linestyles="dashed", label=label)
    axes.set_xticks(range(len(tasks)), [COLUMNS[task] for task in tasks])
    axes.set_ylabel("test accuracy, %")
    figure.legend(loc="outside upper center", ncols=len(table) + 1, fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    cli.run(report)
