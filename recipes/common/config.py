"""A recipe's settings: one dataclass, read from YAML, changed by `key=value`, every value checked against the field's type.

A file may name another under `base` (a path relative to itself) and state only what differs; dictionaries are merged.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from recipes.common.errors import OptionError, RecipeError
from recipes.common.reading import parse_yaml, read_yaml

C = TypeVar("C")


def load_config(cls: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read `path` and `overrides` ("key=value", the value in YAML, a dot reaching into a dictionary) into the dataclass `cls`.

    Raises:
        RecipeError: the file is missing or is no YAML mapping, a key is unknown, a value has the wrong type, or
            `cls.__post_init__` raised a `ValueError`.
    """
    values = _read(Path(path))
    for override in overrides:
        _apply(values, override)
    try:
        return build(cls, values, str(path))
    except RecipeError as error:
        raise RecipeError(_naming_its_option(str(error), f"{path}: ", overrides)) from None


def build(cls: type[C], values: Mapping[str, Any], where: str, written: Callable[[str], str] | None = None) -> C:
    """Make the dataclass `cls` of a dictionary.

    Args:
        where: names its origin in error messages.
        written: makes of a field's name what the user wrote, such as "--length", which tells the origin too; None: the name itself.
    """
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "the keys are " + ", ".join(sorted(fields))
            raise RecipeError(f"{where}: unknown key {key!r}; {hint}")
    optional = {n for n, f in fields.items() if (f.default, f.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)}
    required = [name for name in fields if name not in optional and name not in values]
    if required:
        raise RecipeError(f"{where}: {', '.join(required)} must be given; add it to the file or pass --set {required[0]}=VALUE")
    typed = {key: typed_value(value, hints[key], f"{where}: {key}" if written is None else written(key)) for key, value in values.items()}
    try:
        return cls(**typed)
    except ValueError as error:
        told = error.told(written) if written and isinstance(error, OptionError) else str(error)
        raise RecipeError(told if written else f"{where}: {told}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain values, for `dump` and for comparing two runs."""
    return dataclasses.asdict(config)


def dump(config: Any) -> str:
    """The dataclass, or its dictionary, as YAML in field order."""
    values = config if isinstance(config, dict) else to_dict(config)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _read(path: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    place = os.path.realpath(path)
    if place in seen:
        raise RecipeError(f"{path}: its 'base' leads back to itself; name another file")
    values = read_yaml(path)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected lines of 'key: value', got a {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or "\0" in base:
        raise RecipeError(f"{path}: base: expected the path of another YAML file, got {base!r:.200}")
    return _merge(_read(path.parent / base, (*seen, place)), values)


def _naming_its_option(told: str, origin: str, overrides: Sequence[str]) -> str:
    """An error of the file as one of the override whose value it is about, if it is about one."""
    about = told.removeprefix(origin)
    for override in reversed(overrides) if about != told else ():
        key = override.partition("=")[0].strip()
        parent, _, last = key.rpartition(".")
        unknown = f"{parent}: unknown key {last!r}" if parent else f"unknown key {last!r}"
        if about.startswith(unknown):
            return f"--set {key}: {about}"
        if re.match(rf"{re.escape(key)}(?!\w)", about):
            return f"--set {about}"
    return told


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override!r}: expected key=value")
    value = parse_yaml(text, f"--set {override!r:.200}")
    *parents, last = key.strip().split(".")
    target = values
    for parent in parents:
        inner = target.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override!r}: {parent!r} is not a dictionary, so it has no key {last!r}")
        target = inner
    target[last] = value


def typed_value(value: Any, hint: Any, where: str) -> Any:
    """A value of YAML as a field of this type has it.

    Raises:
        RecipeError: it is none; `where` begins the sentence.
    """
    if hint is Any:
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        for option in options:
            try:
                return typed_value(value, option, where)
            except RecipeError:
                if len(options) == 1:
                    raise
        raise RecipeError(f"{where}: expected {_name(hint)}, got {value!r:.200}")
    if origin is Literal:
        if value is False and "no" in arguments:
            return "no"  # YAML 1.1 reads the word no as false
        if value not in arguments:
            raise RecipeError(f"{where}: expected one of {', '.join(map(str, arguments))}, got {value!r:.200}")
        return value
    if origin is list and isinstance(value, list):
        return [typed_value(item, arguments[0], f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(typed_value(item, arguments[0], f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {typed_value(k, arguments[0], where): typed_value(v, arguments[1], f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return build(hint, value, where)
    if hint is float and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3, without a dot, as text.
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint in (bool, int, str) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        if hint is int and abs(value) >= 2**63:
            raise RecipeError(f"{where}: {value!r:.40} is too large a number; give a smaller one")
        return value
    raise RecipeError(f"{where}: expected {_name(hint)}, got {value!r:.200}")


def _name(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("nothing (null)" if option is type(None) else _name(option) for option in get_args(hint))
    if get_origin(hint) in (list, tuple):
        return f"a list, each of it {_name(get_args(hint)[0])}"
    if get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return "a dictionary"
    return names.get(hint, str(hint))
