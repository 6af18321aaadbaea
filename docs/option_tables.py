"""Tables of options, made from what reads them: a command's from its signature, a class's from its fields and docstrings.

python docs/option_tables.py puts them where `options.md` says `<!-- options: NAME -->`.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import types
from collections.abc import Iterator
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import griffe
from typer.models import ArgumentInfo, ParameterInfo
from typer.utils import get_params_from_function

import linattn

PAGE = Path(__file__).with_name("options.md")
_TABLE = re.compile(r"(?<=<!-- options: )(\S+) -->\n(\n\|[^\n]*(?:\n\|[^\n]*)*\n)?")
WORDS = {str: "text", Path: "path", bool: "true, false", int: "whole number", float: "number", dict: "mapping"}


class Row(NamedTuple):
    option: str
    takes: str
    default: str
    text: str


def table(name: str) -> str:
    """The options of the command `linattn NAME`, or of the class `module.Class`, in Markdown."""
    rows = _of_command(name) if name in linattn.STAGES else _of_class(*name.rsplit(".", 1))
    lines = ["| option | takes | default | |", "|---|---|---|---|"]
    for text, group in itertools.groupby(rows, key=lambda row: row.text):  # a, b and c are explained in one sentence
        alike = list(group)
        default = ", ".join(filter(None, (row.default for row in alike)))
        cells = (", ".join(row.option for row in alike), alike[0].takes, default, text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def filled(page: str) -> str:
    """A page with the tables that its comments name, in the place of those that stood there."""
    return _TABLE.sub(lambda found: f"{found[1]} -->\n\n{table(found[1])}\n", page)


def _of_command(name: str) -> Iterator[Row]:
    for one in get_params_from_function(import_module(linattn.STAGES[name][0]).main).values():
        yield _typed(one.name, one.annotation, one.default.default, one.default)


def _typed(name: str, kind: Any, default: Any, info: ParameterInfo) -> Row:
    """A row for what the command line takes."""
    word = (info.param_decls or ["--" + name.replace("_", "-")])[0]
    if isinstance(info, ArgumentInfo):
        return Row(f"`{info.metavar or name.upper()}`", _takes(kind), "", info.help or "")
    if kind is bool:
        both = f"`{word}`" if info.param_decls else f"`{word}`, `--no-{word[2:]}`"
        return Row(both, "", f"`{word}`" if default else "", info.help or "")
    bounds = {(True, False): f", from {info.min}", (True, True): f", {info.min} to {info.max}"}
    return Row(f"`{word}`", _takes(kind) + bounds.get((info.min is not None, info.max is not None), ""), _shown(default), info.help or "")


def _of_class(module: str, name: str) -> Iterator[Row]:
    """Rows for the fields that the class has of its own."""
    kind = getattr(import_module(module), name)
    hints, told, fields = get_type_hints(kind), _docstrings(module, name), {one.name: one for one in dataclasses.fields(kind)}
    for one in inspect.signature(kind).parameters.values():
        if one.name not in kind.__annotations__ or one.kind is one.VAR_KEYWORD:
            continue
        field = fields[one.name]
        default = one.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if "typer" in field.metadata:
            yield _typed(one.name, hints[one.name], default, field.metadata["typer"])
        else:
            yield Row(f"`{one.name}`", _takes(hints[one.name]), _shown(default), told[one.name])


def _docstrings(module: str, name: str) -> dict[str, str]:
    """What is said of each field, below it or in the docstring of the class."""
    file = Path(str(import_module(module).__file__))
    found = griffe.visit(module, filepath=file, code=file.read_text(encoding="utf-8"))[name]
    told = {member: one.docstring.value for member, one in found.members.items() if one.docstring}
    for section in found.docstring.parse("google", warnings=False) if found.docstring else []:
        if section.kind is griffe.DocstringSectionKind.parameters:
            told |= {member.strip(): one.description for one in section.value for member in one.name.split(",")}
    return {member: " ".join(text.split()) for member, text in told.items()}


def _takes(kind: Any) -> str:
    """A type in words, None left out."""
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if outer in (Union, types.UnionType):
        return " or ".join(_takes(one) for one in inner if one is not types.NoneType)
    if outer is Literal or issubclass(outer, Enum):
        return ", ".join(f"`{choice}`" for choice in inner or (one.value for one in kind))
    return f"list of {_takes(inner[0])}" if outer in (list, tuple) else WORDS[outer]


def _shown(default: Any) -> str:
    if default is inspect.Parameter.empty or default is ... or default in (None, "", [], {}, ()):
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default.value if isinstance(default, Enum) else f'{default:_}' if isinstance(default, int) else default}`"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
