"""Holds models against their teacher: loss and bits a byte, KL, recall, the usual tasks, what generating costs.

    python -m convert.evaluate MODEL... --teacher T --data FILE [--data FILE ...] --out DIR

MODEL is a folder, a GGUF file or a hub id, or NAME=MODEL to name its row. Every measurement is stored as soon as it is made: after an end
of any kind ``--resume`` goes on, also with more models or measurements. ``DIR/report`` holds the page.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from convert.evaluation.options import RECALL, TASKS, EvaluationOptions, chosen, whole_numbers
from recipes.common import cli
from recipes.common.place import check_place

COMMAND = "convert.evaluate"


def evaluate(
    options: EvaluationOptions, out: str | Path, resume: bool = False, overwrite: bool = False, tell: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Measures what ``options`` ask for that ``out`` does not hold yet.

    Returns:
        What was found, by model and measurement.

    Raises:
        ConversionError: in one sentence, whatever a user can do something about.
    """
    # Late, since importing torch takes seconds: what is wrong with the arguments has been said by now.
    from transformers.utils import logging

    from convert.evaluation.cards import write_cards
    from convert.evaluation.curves import read_curves
    from convert.evaluation.measurements import measure_all
    from convert.evaluation.report import write_report
    from convert.evaluation.selection import read_ranking
    from convert.evaluation.store import Store

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ranking = read_ranking(options.ranking) if options.ranking else None
    curves = read_curves(options)
    store = Store(out, options.inputs(), resume, overwrite)
    try:
        results = measure_all(options, store, tell)
        write_report(store.folder / "report", results, curves, ranking, options.commands(out))
        for path in write_cards(options, results) if options.card else ():
            tell(f"written to {path}")
        return results
    finally:
        store.close()


def main(
    teacher: Annotated[str, typer.Option(help="What the models are held against: a folder, a GGUF file or a hub id.", show_default=False)],
    data: Annotated[list[Path], typer.Option(help="Held-out text, a file; may be repeated.", show_default=False)],
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="The same, or NAME=MODEL.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out/evaluation"),
    rows: Annotated[int, typer.Option(help="Rows of the shortest length from each file, and as many tokens in longer ones.", min=1)] = 24,
    length: Annotated[str, typer.Option(help="Tokens a row; several beyond one another, such as 1024,4096.")] = "1024",
    window_control: Annotated[str, typer.Option(help="Windows to put the teacher under, untrained, such as 64,128.")] = "",
    sinks: Annotated[int, typer.Option(help="First tokens that it sees besides.", min=0)] = 4,
    recall: Annotated[str, typer.Option(help=f"Some of {', '.join(RECALL)}; all; or none.")] = "all",
    distances: Annotated[str, typer.Option(help="Tokens between a key and where it is asked for.")] = "40,150,400,900,1900",
    needles: Annotated[int, typer.Option(help="Prompts of each kind and distance.", min=1)] = 100,
    recall_length: Annotated[int, typer.Option(help="Tokens of a prompt, where the distance does not need more.", min=64)] = 1024,
    filler: Annotated[Path | None, typer.Option(help="Text to hide keys in (default: the first --data).", show_default=False)] = None,
    ranking: Annotated[Path | None, typer.Option(help="What convert.select_layers wrote, to be shown.", show_default=False)] = None,
    run: Annotated[list[str] | None, typer.Option(help="Folder of a training run whose curves are shown, or NAME=FOLDER.")] = None,
    tasks: Annotated[str, typer.Option(help=f"lm-eval's: some of {', '.join(TASKS)}; all; or none.")] = "none",
    task_rows: Annotated[Path | None, typer.Option(help="Folder of their rows (default: from the hub).", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="Examples a task (default: all).", min=1, show_default=False)] = None,
    decode: Annotated[str, typer.Option(help="Lengths at which the cache and a token's time are measured.")] = "512,2048",
    batch_tokens: Annotated[int, typer.Option(help="Tokens a batch; 0: 32,768 on a GPU, 4,096 on a CPU.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; by default a GPU if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; by default bfloat16 on a GPU.")] = "",
    seed: Annotated[int, typer.Option(help="Of the prompts.", min=0)] = 0,
    card: Annotated[bool, typer.Option("--card", help="Put each student's tables into its README.md.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Measure what is not there yet.")] = False,
    overwrite: cli.Overwrite = False,
) -> None:
    """Hold models against their teacher."""
    options = EvaluationOptions(
        models=tuple(models or ()),
        teacher=teacher,
        data=tuple(data),
        rows=rows,
        lengths=whole_numbers(length, "--length", 2),
        windows=whole_numbers(window_control, "--window-control"),
        sinks=sinks,
        recall=chosen(recall, "--recall", RECALL),
        distances=whole_numbers(distances, "--distances"),
        needles=needles,
        recall_length=recall_length,
        filler=filler,
        ranking=ranking,
        runs=tuple(run or ()),
        tasks=chosen(tasks, "--tasks", TASKS),
        task_rows=task_rows,
        limit=limit,
        decode=whole_numbers(decode, "--decode"),
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        seed=seed,
        card=card,
    )
    check_place(out, COMMAND, inputs=options.inputs(), resume=resume, overwrite=overwrite)
    console = cli.console()
    results = evaluate(options, out, resume, overwrite, tell=lambda text: console.print(text, soft_wrap=True))
    _show(console, results)
    console.print(f"written to {out}: report/index.html, report/report.md, measured/", soft_wrap=True)


def _show(console: Any, results: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    from convert.evaluation.tables import all_tables

    for number, table in enumerate(all_tables(results)):
        # The first has long headings and many of them: a model a column.
        cells = list(zip(*table.cells, strict=True)) if number == 0 else table.cells
        shown = Table(*cells[0], title=table.title, title_justify="left")
        for row in cells[1:]:
            shown.add_row(*row)
        console.print(shown)


app = cli.app(main)


if __name__ == "__main__":
    app()
