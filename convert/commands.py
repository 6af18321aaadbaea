"""A dataclass of options as a command: its fields say how the command line asks for them, so that no option is written down twice."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, field, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from typer.models import ArgumentInfo

from recipes.common.config import build, typed_value
from recipes.common.errors import OptionError, RecipeError

O = TypeVar("O")  # noqa: E741
_RESUME = "Go on from the newest checkpoint of the same run, if there is one."
_OVERWRITE = "Replace what this command wrote to the output before."


def argument(name: str, text: str, default: Any = MISSING, **asked: Any) -> Any:
    """A field that the command line takes by its place, and calls `name`; `asked` as of `option`."""
    return field(default=default, metadata={"typer": typer.Argument(metavar=name, help=text, show_default=False), **asked})


def option(
    default: Any, text: str, *, name: str = "", kind: Any = None, told: Any = None, parse: Callable[[Any, str], Any] | None = None,
    flag: str = "", show_default: bool = True, **bounds: Any,
) -> Any:  # fmt: skip
    """A field that the command line takes by its name.

    Args:
        default: the field's; MISSING where it must be given.
        name: what the command line calls it, if not as the field is called.
        kind, told: its type and its default on the command line, where these are not the field's.
        parse: makes the field's value of what was given there and of the option's name, such as "--distances".
        flag: of what is true where it is given, its only form.
        show_default: whether help tells the default.
        bounds: min and max, which the library typer checks, and `StageOptions` too.
    """
    told_by = typer.Option(*([flag] if flag else []), help=text, show_default=show_default and default is not MISSING, **bounds)
    metadata = {"typer": told_by, "bounds": bounds, "name": name, "kind": kind, "told": told, "parse": parse, "flag": flag}
    return (
        field(default_factory=lambda: list(default), metadata=metadata)
        if isinstance(default, list)
        else field(default=default, metadata=metadata)
    )


def parameter(name: str, kind: Any, info: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """One of a command's own parameters, which are no options of its work, such as its output."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


RESUME = parameter("resume", bool, typer.Option("--resume", help=_RESUME), False)
OVERWRITE = parameter("overwrite", bool, typer.Option("--overwrite", help=_OVERWRITE), False)


def check_size(one: Field[Any], value: Any, name: str = "") -> None:
    """Refuses a number beyond the bounds of its field, which `name` is written for in the error.

    Raises:
        OptionError: it is.
    """
    bounds = one.metadata.get("bounds", {})
    low, high = bounds.get("min", -math.inf), bounds.get("max", math.inf)
    if isinstance(value, int | float) and not low <= value <= high:
        name = name or f"{{{one.name}}}"
        raise OptionError(f"{name} is {value}; expected {f'{low} to {high}' if high < math.inf else f'at least {low}'}")


def read_keys(options: type, given: Mapping[str, Any], written: Callable[[str], str]) -> dict[str, Any]:
    """The fields that a recipe gives, by the names that the command line has for them with _ for -, as that would read them.

    Args:
        written: makes of such a name what stands in errors.

    Raises:
        RecipeError: the command line would refuse one.
    """
    hints, named, read = get_type_hints(options), {_name(one): one for one in fields(options)}, {}  # type: ignore[arg-type]
    for key, value in given.items():
        one, kind, hint = named[key], named[key].metadata.get("kind"), hints[named[key].name]
        if value is None or value == "":
            continue  # as if it were not given
        if kind not in (None, str):  # files or folders, each of which has a flag
            typed_value(value if isinstance(value, list) else [value], list[str], written(key))
            continue
        if parse := one.metadata.get("parse"):
            read[one.name] = parse(str(value), written(key))
            continue
        if isinstance(value, str) and hint in (int, int | None):
            with suppress(ValueError):  # else it is refused as the text that it is
                value = int(value)
        read[one.name] = typed_value(value, hint, written(key))
        check_size(one, read[one.name], written(key))
    return read


def command(options: type[O], run: Callable[..., None], *own: inspect.Parameter) -> Callable[..., None]:
    """A function for the command line whose parameters are the fields of `options` and `own`; it calls `run(options, **own)`."""

    def main(**values: Any) -> None:
        kept = {one.name: values.pop(one.name) for one in own}
        given = {one.name: _given(one, values[_name(one)]) for one in fields(options)}  # type: ignore[arg-type]
        built = build(options, given, "the arguments", flag)
        try:
            run(built, **kept)
        except OptionError as error:
            raise RecipeError(error.told(flag)) from error

    def flag(name: str) -> str:
        return written.get(name, name)

    hints, written = get_type_hints(options), {one.name: _flag(one) for one in fields(options)}  # type: ignore[arg-type]
    asked = [parameter(_name(one), one.metadata.get("kind") or hints[one.name], one.metadata["typer"], _default(one))
             for one in fields(options)]  # type: ignore[arg-type]  # fmt: skip
    parameters = [*asked, *own]
    main.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    main.__annotations__ = {one.name: one.annotation for one in parameters}
    main.__doc__ = str(run.__doc__).splitlines()[0]
    return main


def without_opposite(options: type) -> set[str]:
    """The flags that are given or left out, such as "--card", and have no form with --no-."""
    return {one.metadata["flag"] for one in fields(options) if one.metadata.get("flag")}  # type: ignore[arg-type]


def _name(one: Field[Any]) -> str:
    return one.metadata.get("name") or one.name


def _flag(one: Field[Any]) -> str:
    """How the command line writes it."""
    info = one.metadata["typer"]
    return str(info.metavar) if isinstance(info, ArgumentInfo) else f"--{_name(one).replace('_', '-')}"


def _given(one: Field[Any], value: Any) -> Any:
    if parse := one.metadata.get("parse"):
        return parse(value, _flag(one))
    return list(value) if isinstance(value, tuple) else value


def _default(one: Field[Any]) -> Any:
    if one.metadata.get("told") is not None:
        return one.metadata["told"]
    if one.default_factory is not MISSING:
        return one.default_factory()
    return inspect.Parameter.empty if one.default is MISSING else one.default
