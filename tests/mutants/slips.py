"""Slips at random places: a comparison swapped, a number one off, a condition turned round, a line dropped, two arguments exchanged.

What no test could notice is left out: annotations, the text of messages, and how a picture looks. Some of what is left changes nothing
that matters all the same, and has to be judged by eye.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path

from .mutant import CONVERTER, OPERATOR, PLUGIN, RECIPES, Mutant

FILES = {
    OPERATOR: ("hf_linattn/ops/*.py",),
    PLUGIN: ("hf_linattn/*.py", "hf_linattn/forms/*.py"),
    CONVERTER: ("convert/**/*.py",),
    RECIPES: ("recipes/**/*.py",),
}
# a GPU's; a report to read; pictures
LEFT_OUT = ("hf_linattn/ops/cuda.py", "hf_linattn/env.py", "recipes/common/plots.py", "convert/evaluation/pictures.py")
PICTURES = ("draw", "plot", "show", "summary", "extra_repr")

# the same exchanged, or none at all
EITHER_WAY = ("min", "max", "minimum", "maximum", "isinstance", "issubclass", "getattr", "setattr", "hasattr")

SWAPPED = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is", "in": "not in", "not in": "in",
    "+": "-", "-": "+", "*": "/", "/": "*", "and": "or", "or": "and",
}  # fmt: skip
Span = tuple[int, int]


def draw(root: Path, kinds: list[str], number: int, seed: int) -> list[Mutant]:
    """As many slips as asked for, spread evenly over the kinds."""
    chance = random.Random(seed)
    found = {kind: [(file, site) for file in _sources(root, kind) for site in _sites(file.read_text(encoding="utf-8"))] for kind in kinds}
    drawn = []
    for count, kind in enumerate(kinds):
        share = number // len(kinds) + (count < number % len(kinds))
        for file, (name, span, new) in chance.sample(found[kind], share):
            old, changed = _around(file.read_text(encoding="utf-8"), span, new)
            drawn.append(Mutant(kind, name, file.relative_to(root).as_posix(), old, changed))
    return drawn


def _sources(root: Path, kind: str) -> list[Path]:
    left_out = {root / name for name in LEFT_OUT}
    return sorted({path for pattern in FILES[kind] for path in root.glob(pattern)} - left_out)


def _around(text: str, span: Span, new: str) -> tuple[str, str]:
    """Whole lines that stand in the text only once, and the same with the slip."""
    begin, end = text.rfind("\n", 0, span[0]) + 1, text.find("\n", span[1])
    while text.count(text[begin:end]) > 1:
        begin = text.rfind("\n", 0, begin - 1) + 1
    return text[begin:end], text[begin : span[0]] + new + text[span[1] : end]


def _sites(text: str) -> Iterator[tuple[str, Span, str]]:
    """Each place of a slip: its name, the span of text it replaces, and by what."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    raw = text.encode()

    def place(line: int, column: int) -> int:
        return len(raw[: starts[line - 1] + column].decode())

    def span(node: ast.AST) -> Span:
        return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    for node in _nodes(ast.parse(text)):
        yield from _slips_at(node, text, span)


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All that runs and can be noticed."""
    if isinstance(node, (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)):
        return
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in PICTURES:
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: a guard against what does not happen
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING"):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _nodes(child)


def _slips_at(node: ast.AST, text: str, span) -> Iterator[tuple[str, Span, str]]:
    def between(left: ast.AST, right: ast.AST, name: str) -> Iterator[tuple[str, Span, str]]:
        begin, end = span(left)[1], span(right)[0]
        sign = text[begin:end].strip(" ()\n\\")
        at = text.find(sign, begin)
        if sign in SWAPPED:
            yield name, (at, at + len(sign)), SWAPPED[sign]

    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield from between(node.left, node.comparators[0], "a comparison swapped")
    if isinstance(node, ast.BinOp):
        yield from between(node.left, node.right, "an operation swapped")
    if isinstance(node, ast.BoolOp):
        yield from between(node.values[0], node.values[1], "and for or")
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        begin, end = span(node.test)
        yield "a condition turned round", (begin, end), f"(not ({text[begin:end]}))"
    if isinstance(node, ast.Constant) and type(node.value) in (int, bool):
        yield "a constant changed", span(node), str(not node.value if isinstance(node.value, bool) else node.value + 1)
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield "a line dropped", span(node), "pass"
    if isinstance(node, ast.Call) and _name(node) not in EITHER_WAY and len(node.args) > 1 and not any(map(_starred, node.args[:2])):
        (first, last), (begin, end) = map(span, node.args[:2])
        if text[first:last] != text[begin:end]:
            yield "two arguments exchanged", (first, end), text[begin:end] + text[last:begin] + text[first:last]


def _name(call: ast.Call) -> str:
    return getattr(call.func, "id", "") or getattr(call.func, "attr", "")


def _starred(node: ast.AST) -> bool:
    return isinstance(node, ast.Starred)
