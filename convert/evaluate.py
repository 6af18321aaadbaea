"""Holds models against their teacher: loss and bits a byte, KL, recall, the usual tasks, what generating costs.

    python -m convert.evaluate MODEL... --teacher T --data FILE [--data FILE ...] --out DIR

MODEL is a folder, a GGUF file or a hub id, or NAME=MODEL to name its row. Every measurement is stored as soon as it is made: after an end
of any kind ``--resume`` goes on, also with more models or measurements. ``DIR/report`` holds the page.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from convert.commands import OVERWRITE, command, parameter
from convert.evaluation.options import EvaluationOptions
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


def _run(options: EvaluationOptions, out: Path, resume: bool, overwrite: bool) -> None:
    """Hold models against their teacher."""
    check_place(out, COMMAND, inputs=options.inputs(), resume=resume, overwrite=overwrite)
    console = cli.console()
    results = evaluate(options, out, resume, overwrite, tell=lambda text: console.print(text, soft_wrap=True))
    _show(console, results)
    console.print(f"written to {out}: report/index.html, report/report.md, measured/", soft_wrap=True)


def _show(console: Any, results: dict[str, dict[str, Any]]) -> None:
    from convert.evaluation.tables import all_tables
    from recipes.common.tables import ShownTable

    tables = all_tables(results)
    for number, table in enumerate(tables):
        # The first has long headings and many of them: a model a column.
        cells = list(zip(*table.cells, strict=True)) if number == 0 else table.cells
        console.print(ShownTable(cells, table.title))
        if table.note not in [later.note for later in tables[number + 1 :]]:  # below the last that it is of
            console.print(table.note)


_OUT = parameter("out", Path, typer.Option(help="Folder of the results."), Path("out/evaluation"))
_RESUME = parameter("resume", bool, typer.Option("--resume", help="Measure what is not there yet."), False)
main = command(EvaluationOptions, _run, _OUT, _RESUME, OVERWRITE)
app = cli.app(main)


if __name__ == "__main__":
    app()
