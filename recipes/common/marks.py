"""The mark that a command leaves in every folder it makes: who wrote the folder, and what was written then.

`.hf_linattn.json` holds

    command   who wrote the folder, such as convert.linearize
    version   of this package
    files     each file's path in the folder: [bytes, SHA-256]; null while the folder is being written
    grows     patterns of files that are ours by their names, because they are written to later, such as a run's metrics
    folders   patterns of folders with marks of their own, such as a run's checkpoints
    process   who is writing it, or wrote it last
    parents   how many of the folders above it were made for it, which go with it if it never comes to its place

Paths in a mark are only ever looked up, never followed: what is removed is found by walking the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recipes.common.errors import RecipeError
from recipes.common.reading import MOST_BYTES, parse_json, read_text

MARK = ".hf_linattn.json"
LOCK = ".hf_linattn.lock"


@dataclass(frozen=True)
class Mark:
    """The content of a mark; see above."""

    command: str
    version: str
    files: dict[str, Any] | None
    grows: Sequence[str] = ()
    folders: Sequence[str] = ()
    process: str = ""
    parents: int = 0


def read_mark(folder: Path) -> Mark | None:
    """The mark of `folder`, None where it has none that can be understood."""
    path = folder / MARK
    if path.is_symlink():
        return None
    try:
        mark = Mark(**parse_json(read_text(path, MOST_BYTES), path))
    except (RecipeError, TypeError):
        return None
    lists = isinstance(mark.grows, list) and isinstance(mark.folders, list)
    right = lists and isinstance(mark.files, dict | None) and isinstance(mark.parents, int)
    return mark if right and all(isinstance(text, str) for text in (mark.command, mark.process, *mark.grows, *mark.folders)) else None


def begin(folder: Path, command: str, parents: int = 0) -> None:
    """Mark a new folder as one that `command` is writing: until `seal`, everything in it is ours."""
    _write(folder, Mark(command, _version(), None, process=_process(), parents=parents))


def seal(folder: Path, command: str, grows: Sequence[str] = (), folders: Sequence[str] = ()) -> None:
    """Mark `folder` as finished: what lies in it now was written by `command`."""
    unlisted = Mark(command, _version(), {}, grows, folders)
    files = {}
    for path, ours in account(folder, unlisted, compare=False):
        if not ours:
            files[path.relative_to(folder).as_posix()] = _written(path)
    _write(folder, Mark(command, _version(), files, grows, folders))


def sign(folder: Path, mark: Mark) -> None:
    """Enter this process as the one that writes the folder."""
    _write(folder, Mark(**{**asdict(mark), "process": _process()}))


def enter(path: Path, mark: Mark) -> None:
    """Enter the file as it is now in the mark of its folder."""
    files = {**(mark.files or {}), path.name: _written(path)}
    _write(path.parent, Mark(**{**asdict(mark), "files": files}))


def foreign(folder: Path, mark: Mark) -> list[str]:
    """Paths in `folder` that its mark does not account for: not written then, or changed since."""
    return [path.relative_to(folder).as_posix() for path, ours in account(folder, mark) if not ours]


def remove(folder: Path, mark: Mark) -> bool:
    """Remove what the mark accounts for, the mark itself last, and every folder that is empty then. False where something stays."""
    for path, ours in account(folder, mark, compare=False):
        if ours and path.name != MARK:
            path.unlink(missing_ok=True)
    for parent, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # a folder that is not empty stays
            if os.listdir(parent) == [MARK]:
                (Path(parent) / MARK).unlink()
            os.rmdir(parent)
    return not folder.exists()


def account(folder: Path, mark: Mark, compare: bool = True) -> Iterator[tuple[Path, bool]]:
    """Everything in `folder` but folders, each with whether it is ours; with `compare`, only if it is as it was written."""
    yield from _account(folder, folder, mark, compare)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _account(root: Path, folder: Path, mark: Mark, compare: bool) -> Iterator[tuple[Path, bool]]:
    for path in sorted(folder.iterdir()):
        name = path.relative_to(root).as_posix()
        if path.is_symlink() or not path.is_dir():
            yield path, _is_ours(path, name, mark, compare)
        elif _matches(name, mark.folders) and (own := read_mark(path)) and own.files is not None and own.command == mark.command:
            yield from _account(path, path, own, compare)
        else:
            yield from _account(root, path, mark, compare)


def _is_ours(path: Path, name: str, mark: Mark, compare: bool) -> bool:
    if mark.files is None or name in (MARK, LOCK):
        return True
    if path.is_symlink() or not path.is_file():
        return False
    if _matches(name, mark.grows):
        return True
    written = mark.files.get(name)
    return written is not None and (not compare or written == _written(path))


def _written(path: Path) -> list[Any]:
    return [path.stat().st_size, digest(path)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _write(folder: Path, mark: Mark) -> None:
    aside = folder / f"{MARK}.new"
    aside.write_text(json.dumps(asdict(mark), indent=1) + "\n", encoding="utf-8")
    aside.replace(folder / MARK)


def _process() -> str:
    return f"{os.getpid()} on {socket.gethostname()}"


def _version() -> str:
    try:
        return version("hf_linattn")
    except PackageNotFoundError:
        return "from a checkout"
