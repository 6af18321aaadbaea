"""Files that are either whole or absent: written beside their place and moved into it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes.common.errors import RecipeError


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 in place of whatever `path` held; a reader sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """`write_text` of JSON, indented; NaN and infinity are refused by a ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_absent(path: str | Path, overwrite: bool = False) -> None:
    """Raise RecipeError if `path` exists, unless `overwrite`: called before any work, so that a refusal costs nothing."""
    if Path(path).exists() and not overwrite:
        raise RecipeError(f"{path} exists already; choose another place, or pass --overwrite to replace it")


@contextmanager
def staged_directory(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A new directory beside `target`, moved into its place when the block ends well and removed when it does not.

    Raises:
        RecipeError: `target` exists and `overwrite` is False.
    """
    target = Path(target)
    check_absent(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(target)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        if target.exists():
            old = target.with_name(f".{target.name}.old-{os.getpid()}")
            target.rename(old)
            aside.rename(target)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")
