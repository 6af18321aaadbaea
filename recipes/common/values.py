"""What a value on the command line should have been. Typer's own sentence is pydantic's, which speaks of inputs and not of options."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer
from typer.models import ArgumentInfo

WORDS = {int: "a whole number", float: "a number", Path: "a path"}


def wrong_value(error: typer.BadParameter, annotation: Any) -> str | None:
    """What was given and what was expected; None where the error is of another kind, or says so itself.

    Args:
        annotation: of the parameter, `Annotated[type, typer.Option(...)]`.
    """
    cause: Any = error.__cause__
    if type(error) is not typer.BadParameter or not hasattr(cause, "errors"):
        return None
    kind, info = get_args(annotation)[:2]
    parameter: Any = error.param
    name = info.metavar or parameter.name.upper() if isinstance(info, ArgumentInfo) else parameter.opts[0]
    given = str(cause.errors()[0]["input"])
    return f"{name} is {given or repr(given):.200}; expected {expected(kind, info.min, info.max)}"


def expected(kind: Any, low: float | None = None, high: float | None = None) -> str:
    """A type and its bounds in words: "a whole number, at least 2"."""
    outer, inner = get_origin(kind), [one for one in get_args(kind) if one is not types.NoneType]
    if outer is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if outer in (Union, types.UnionType, list):
        return expected(inner[0], low, high)
    word = WORDS.get(kind, "another value")
    if low is None and high is None:
        return word
    if low is None:
        return f"{word}, at most {high}"
    return f"{word}, at least {low}" if high is None else f"{word} from {low} to {high}"
