"""What a command leaves: folders and files that are whole or absent, and nobody else's.

A folder is written beside its place under the name `.NAME.partial-PID` and moved into it when it is whole; it bears a mark
(`recipes.common.marks`) from its first moment. Only a folder with a mark is ever replaced, by the command that wrote it, and only what
was written then is removed. Old and new change places in one step; where the system cannot do that the old steps aside as
`.NAME.old-PID`. What a kill leaves behind is therefore known by its name and its mark, and is cleared up by the next command that
writes there.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recipes.common.errors import RecipeError, stage
from recipes.common.lock import Lock, lock
from recipes.common.marks import MARK, begin, enter, foreign, read_mark, remove, seal
from recipes.common.reading import user_path
from recipes.common.swap import exchange

_LEFT_BEHIND = re.compile(r"\.(?P<name>.+)\.(?P<state>partial|old)-\d+")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 in place of whatever `path` held; a reader sees the old content or the new, never a part."""
    with staged_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """`write_text` of JSON, indented; NaN and infinity are refused by a ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def rewrite(path: Path, text: str) -> None:
    """`write_text` over a file right in a folder that a command of ours wrote: it stays that command's, unless somebody has changed it."""
    mark = read_mark(path.parent)
    is_ours = mark is not None and path.name in (mark.files or {}) and path.name not in foreign(path.parent, mark)
    write_text(path, text)
    if mark is not None and is_ours:
        enter(path, mark)


@contextmanager
def staged_file(path: str | Path) -> Iterator[Path]:
    """A path to write to, moved over `path` when the block ends well; for files inside a folder that is ours."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, held = _begin(path, "a file")
    try:
        yield aside / path.name
        (aside / path.name).replace(path)
    finally:
        discard(aside)
        held.release()


def output_path(name: str | Path) -> Path:
    """The folder that a user names to be written.

    Raises:
        RecipeError: it has no name by which a new folder could take its place, as . and .. have none.
    """
    path = user_path(name)
    if path.name in ("", ".."):
        raise RecipeError(f"the output {name} has no name of its own; give the path of a folder to make, such as {path / 'new'}")
    return path


def check_target(target: str | Path, command: str, *, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> None:
    """Whether `command` may write the folder `target`: called before any work, so that a refusal costs nothing.

    What killed commands left beside it is cleared up first.

    Args:
        overwrite: whether the user asked to replace what is there.
        inputs: what the command reads; names that are no path, such as a hub id, do not matter.

    Raises:
        RecipeError: it is, holds or lies in an input; it exists without `overwrite`; or it holds what `command` did not write.
    """
    target = output_path(target)
    with stage(f"looking at the output {target}", "choose another place"):
        check_apart(target, inputs)
        check_writable(target)
        clear_up(target.parent, target.name)
        if not os.path.lexists(target):
            return
        if not overwrite:
            refuse_others(target, command)
            raise RecipeError(f"{target} exists already; choose another place, or pass --overwrite to replace it")
        _check_ours(target, command)


def check_writable(path: Path) -> None:
    """Raise RecipeError where nothing can be made at `path`, by the nearest that there is above it."""
    above = next(place for place in path.absolute().parents if os.path.lexists(place))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RecipeError(f"{path} cannot be written, since {above} is no folder that can be; choose another place")


def refuse_others(target: Path, command: str) -> None:
    """Raise RecipeError where what is at `target` is none of `command`'s, as far as that is seen at a glance: nothing would replace it."""
    if target.is_symlink() or not target.is_dir():
        raise RecipeError(f"{target} exists already and is no folder; choose another place")
    if any(target.iterdir()) and ((mark := read_mark(target)) is None or mark.command != command):
        raise RecipeError(f"{target} exists already and was not written by {command}; choose another place")


def check_apart(target: Path, inputs: Iterable[str | Path]) -> None:
    """Raise RecipeError where `target` is, holds or lies in one of `inputs`, through links."""
    for name in inputs:
        if _overlap(target, user_path(name)):
            raise RecipeError(f"the output {target} overlaps the input {name}; choose another place")


@contextmanager
def staged_directory(
    target: str | Path,
    command: str,
    *,
    overwrite: bool = False,
    inputs: Sequence[str | Path] = (),
    grows: Sequence[str] = (),
    folders: Sequence[str] = (),
) -> Iterator[Path]:
    """A new folder beside `target`, moved into its place when the block ends well and removed when it does not.

    Args:
        command, overwrite, inputs: as in `check_target`, which is asked before and again after the block.
        grows, folders: patterns of what will come into the folder later; see `recipes.common.marks`.

    Raises:
        RecipeError: `check_target` refuses, or the file system does.
    """
    target = output_path(target)
    check_target(target, command, overwrite=overwrite, inputs=inputs)
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside, held = _begin(target, command, len(made))
        try:
            yield aside
            _give_usual_modes(aside)
            seal(aside, command, grows, folders)
            check_target(target, command, overwrite=overwrite, inputs=inputs)
            _move_into_place(aside, target)
        finally:
            discard(aside)  # the unfinished, or the old
            held.release()
    except OSError as error:
        with stage(f"writing {target}"):
            raise error
    finally:
        _remove_empty(made)


def discard(folder: Path) -> None:
    """Remove a folder that is ours, or what was written of it; what else lies in it stays, and is named on the screen."""
    if not folder.is_dir():
        return
    mark = read_mark(folder)
    if mark is None:
        _remove_bare(folder)
    elif not remove(folder, mark):
        _say(f"{folder} holds what {mark.command} did not write, such as {foreign(folder, mark)[:1]}; it was left there")


def clear_up(folder: Path, name: str | None = None) -> None:
    """Clear up what commands that were killed left in `folder`, all of it or that of one `name`; say so on the screen.

    A folder that had stepped aside for a new one that never came is put back.
    """
    for path in sorted(folder.glob(".*")) if folder.is_dir() else ():
        match = _LEFT_BEHIND.fullmatch(path.name)
        if not match or name not in (None, match["name"]) or path.is_symlink() or not path.is_dir():
            continue
        held = lock(path)
        if held is None:
            continue  # somebody is writing it
        mark, place = read_mark(path), folder / match["name"]
        if mark is None:
            _remove_bare(path)
        elif match["state"] == "old" and mark.files is not None and not os.path.lexists(place):
            path.rename(place)
            _say(f"{place} was put back, which a killed {mark.command} had moved to {path.name}")
        else:
            discard(path)
            _remove_empty(path.parents[: mark.parents])
            _say(f"{path} was removed, which a killed {mark.command} had left")
        held.release()


def hold(folder: Path) -> Lock:
    """Hold the folder for this process.

    Raises:
        RecipeError: another process holds it.
    """
    held = lock(folder, wait=1.0)
    if held is None:
        mark = read_mark(folder)
        who = f"process {mark.process}" if mark and mark.process else "another process"
        raise RecipeError(f"{folder} is being written by {who}; wait until it ends, or choose another place")
    return held


def _check_ours(target: Path, command: str) -> None:
    if target.is_symlink() or not target.is_dir():
        raise RecipeError(f"{target} is no folder, so --overwrite leaves it alone; choose another place")
    if not any(target.iterdir()):
        return
    mark = read_mark(target)
    if mark is None or mark.files is None:
        raise RecipeError(
            f"{target} holds no mark of this program ({MARK}), so --overwrite leaves it alone: it is another's, or of an earlier version; "
            "choose another place, or remove it yourself"
        )
    if mark.command != command:
        raise RecipeError(f"{target} was written by {mark.command}, so {command} --overwrite leaves it alone; choose another place")
    hold(target).release()
    for folder, _, _ in os.walk(target):
        clear_up(Path(folder))
    if others := foreign(target, mark):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise RecipeError(
            f"{target} holds {others[0]}{more}, not written by {command} or changed since, so --overwrite leaves it alone; "
            "move what is yours elsewhere"
        )


def _begin(target: Path, command: str, parents: int = 0) -> tuple[Path, Lock]:
    """A new folder beside `target`, held and marked, with which so many `parents` were made."""
    aside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    if os.path.lexists(aside):  # of one that was killed and had this process's number, as in a container it often has
        clear_up(target.parent, target.name)
    while True:
        aside.mkdir()
        try:
            if held := lock(aside, wait=1.0):
                begin(aside, command, parents)
                return aside, held
        except FileNotFoundError:
            continue  # another process that clears up has taken the empty folder away before it was held
        except OSError:
            _remove_bare(aside)
            raise


def _move_into_place(aside: Path, target: Path) -> None:
    if not target.exists():
        aside.rename(target)
        return
    held = hold(target)
    if not exchange(aside, target):
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        target.rename(old)
        try:
            aside.rename(target)
        except OSError:
            old.rename(target)
            raise
        discard(old)
    held.release()


def _overlap(target: Path, source: Path) -> bool:
    """Whether one is or lies in the other, through links; of a source folder, what its links lead to counts too."""
    if not source.exists():
        return False
    linked = [path for path in source.iterdir() if path.is_symlink() and path.exists()] if source.is_dir() else []
    here = _identities(target)
    return any(there[0] in here or (target.exists() and here[0] in there) for there in map(_identities, [source, *linked]))


def _identities(path: Path) -> list[tuple[int, int]]:
    """Device and inode of `path`, if it exists, and of all folders above it."""
    path = Path(os.path.realpath(path))
    return [(state.st_dev, state.st_ino) for state in (place.stat() for place in [path, *path.parents] if place.exists())]


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove these folders, from the innermost out; those that hold something stay."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _remove_bare(folder: Path) -> None:
    """Remove a folder to which a killed command had not come any further than its making."""
    with suppress(OSError):
        if os.listdir(folder) == [f"{MARK}.new"] and read_mark(folder) is None:
            (folder / f"{MARK}.new").unlink()
        folder.rmdir()


def _give_usual_modes(folder: Path) -> None:
    # safetensors closes its files to everyone else.
    usual = folder.stat().st_mode & 0o666
    for path in folder.rglob("*.safetensors"):
        path.chmod(usual)


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
