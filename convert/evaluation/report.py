"""The page of an evaluation, as Markdown with pictures beside it and as one HTML file that holds everything."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.evaluation.curves import Curves
from convert.evaluation.pictures import draw_all
from convert.evaluation.tables import Results, Table, all_tables
from recipes.common.files import write_text

_STYLE = """body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ccc; padding: .3em .7em; text-align: right } th { vertical-align: bottom }
th:first-child, td:first-child { text-align: left } tr:first-child { border-bottom: 2px solid #222 }
img { max-width: 100% } pre { background: #f4f4f4; padding: .7em; overflow-x: auto } .note { color: #555; font-size: 14px }"""

Block = tuple[str, Any]
"""A kind (heading, text, note, code, table, picture) and its content."""


def write_report(folder: Path, results: Results, curves: Curves, ranking: dict[str, Any] | None, commands: Sequence[str]) -> None:
    """Writes report.md, index.html and the pictures into ``folder``.

    Args:
        folder: which exists; files of the same names are replaced.
        results: what was found, the teacher's first.
        curves: of training.
        ranking: what convert.select_layers wrote.
        commands: that lead to these figures.
    """
    pictures = draw_all(folder, results, curves, ranking)
    blocks = list(_blocks(results, pictures, ranking, commands))
    write_text(folder / "report.md", "\n\n".join(_as_markdown(block) for block in blocks) + "\n")
    body = "\n".join(_as_html(block, folder) for block in blocks)
    title = html.escape(_title(results))
    write_text(
        folder / "index.html",
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>\n{_STYLE}\n</style>\n{body}\n</html>\n",
    )


def _title(results: Results) -> str:
    return "Evaluation: " + ", ".join(list(results)[1:]) if len(results) > 1 else "Evaluation"


def _blocks(results: Results, pictures: Sequence[tuple[str, str]], ranking: dict[str, Any] | None, commands: Sequence[str]) -> list[Block]:
    first, *rest = all_tables(results)
    blocks: list[Block] = [("heading", _title(results)), ("text", _conditions(results)), *_table(first)]
    blocks += [("picture", picture) for picture in pictures]
    for table in rest:
        blocks += _table(table)
    if ranking:
        blocks += _table(_ranking_table(ranking))
    return [*blocks, ("subheading", "Commands"), ("code", "\n".join(commands))]


def _table(table: Table) -> list[Block]:
    return [("subheading", table.title), ("table", table), *([("note", table.note)] if table.note else [])]


def _conditions(results: Results) -> str:
    found = [measured for model in results.values() for measured in model.values() if "device" in measured]
    said = [" and ".join(sorted({str(one[key]) for one in found})) for key in ("device", "torch", "transformers", "dtype")]
    return "Measured on {}, with PyTorch {} and Transformers {}, in {}.".format(*said)


def _ranking_table(ranking: dict[str, Any]) -> Table:
    layers = sorted(ranking["layers"], key=lambda one: -one["key_nats"])
    chosen = set(ranking["chosen"])
    cells = [["layer under a window", "KL", "key, nats a token", "keys right", "chosen"]]
    teacher = ranking["teacher"]
    for name, one, said in [("none", teacher, ""), *((one["layer"], one, "yes" * (one["layer"] in chosen)) for one in layers)]:
        cells.append([str(name), f"{one['kl']:.3f}", f"{one['key_nats']:.3f}", f"{one['hits']:.2f}", said])
    return Table("Layers, one at a time under a window", cells, "By convert.select_layers, on text and keys of its own.")


def _as_markdown(block: Block) -> str:
    kind, content = block
    if kind == "heading":
        return f"# {content}"
    if kind == "subheading":
        return f"## {content}"
    if kind == "code":
        return f"```\n{content}\n```"
    if kind == "table":
        return str(content.markdown())
    if kind == "picture":
        return f"![{content[1]}]({content[0]})\n\n{content[1]}"
    return str(content)


def _as_html(block: Block, folder: Path) -> str:
    kind, content = block
    if kind == "table":
        head, *rows = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in _tagged(content.cells)]
        return "<table>\n" + "\n".join(f"<tr>{row}</tr>" for row in [head, *rows]) + "\n</table>"
    if kind == "picture":
        data = base64.b64encode((folder / content[0]).read_bytes()).decode()
        said = html.escape(content[1])
        return f'<figure><img alt="{said}" src="data:image/png;base64,{data}"><figcaption class="note">{said}</figcaption></figure>'
    tag = {"heading": "h1", "subheading": "h2", "code": "pre", "note": 'p class="note"'}.get(kind, "p")
    return f"<{tag}>{html.escape(content)}</{tag.split()[0]}>"


def _tagged(cells: list[list[str]]) -> list[tuple[str, list[str]]]:
    return [("th" if number == 0 else "td", row) for number, row in enumerate(cells)]
