"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from convert.errors import ConversionError


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Refuses an ``output`` that must not be written; ``source`` counts where it is a folder.

    Raises:
        ConversionError: it exists without ``overwrite``, is no checkpoint's folder, or overlaps ``source``.
    """
    here, there = output.resolve(), source.resolve()
    if source.is_dir() and (here == there or here in there.parents or there in here.parents):
        raise ConversionError(f"the output {output} overlaps the source {source}: give another folder")
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ConversionError(f"{output} exists already: give another folder, or --overwrite to replace it")
    if output.is_symlink() or not output.is_dir():
        raise ConversionError(f"{output} exists and is no folder, so --overwrite leaves it alone: give another name")
    if any(output.iterdir()) and not (output / "config.json").is_file():
        raise ConversionError(f"{output} holds something other than a checkpoint, so --overwrite leaves it alone: give another folder")


@contextmanager
def written_aside(output: Path, overwrite: bool) -> Iterator[Path]:
    """Gives an empty sibling of ``output`` to write into; it takes ``output``'s place at the end, and is removed if anything fails.

    Raises:
        ConversionError: no folder can be made there, the disk failed while it was being written, or ``output`` came into being meanwhile
            and ``overwrite`` is not set.
    """
    made = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        _remove_empty(made)
        reason = error.strerror or error
        raise ConversionError(f"{output} cannot be written ({reason}): give a folder whose parent can be written") from error
    try:
        yield aside
        _give_usual_modes(aside)
        if not overwrite and os.path.lexists(output):
            raise ConversionError(f"{output} has come into being meanwhile and was left alone: give another folder")
        _move_into_place(aside, output)
    except OSError as error:
        raise ConversionError(f"writing {output} failed ({error.strerror or error}); it is as it was before") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _move_into_place(aside: Path, output: Path) -> None:
    if not output.exists():
        aside.rename(output)
        return
    room = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
    old = room / output.name
    try:
        output.rename(old)
        try:
            aside.rename(output)
        except OSError:
            old.rename(output)
            raise
    except OSError:
        if not old.exists():
            room.rmdir()
        raise
    shutil.rmtree(room, ignore_errors=True)


def _give_usual_modes(folder: Path) -> None:
    # Temporary folders, and files that safetensors writes, are closed to everyone else.
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)
