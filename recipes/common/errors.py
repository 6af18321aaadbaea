"""Errors a user can do something about: one sentence on the screen, exit status 2. Errors of ours: one sentence that says so, status 1.

What goes wrong is told by the stage at which it does (`stage`), and never by its type: a full disk alone comes as an OSError, a
RuntimeError of torch or an error of safetensors, and a config that fits no model as whatever the model's code meets first.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

STOPPED = 130
"""The exit status of what Ctrl-C has stopped, as shells have it."""
STATUS_FILE = "_HF_LINATTN_STATUS_FILE"
"""In the environment: where a command writes its exit status if it fails, for whoever started it through a launcher that has its own."""
_ROOT = Path(__file__).resolve().parents[2]
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class RecipeError(ValueError):
    """What was wrong, what was expected and what to do, in one sentence.

    Names out of files stand in it, so what cannot be printed, such as a line's end or a terminal's commands, is written as an escape.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message))


class OptionError(RecipeError):
    """What is wrong with options. Their names stand in braces in the text, since a command line writes them otherwise than a file does."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(self.told(str))

    def told(self, written: Callable[[str], str]) -> str:
        """The sentence, with names as `written` makes them of the fields'."""
        return re.sub(r"\{(\w+)\}", lambda found: written(found[1]), self.text)


def sentence(error: BaseException, limit: int = 300) -> str:
    """The first line of `error`'s message, cut to `limit` characters, for quoting a library's error inside one of ours."""
    if isinstance(error, OSError) and error.errno and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:limit].rstrip(".")


@contextmanager
def stage(doing: str, remedy: str = "") -> Iterator[None]:
    """Whatever fails inside fails as "`doing` failed (why); `remedy`". A RecipeError passes as it is, for it says more.

    Args:
        doing: what is being done to what, as a user would name it: "reading config.json of MODEL".
        remedy: what the user can do.

    Raises:
        RecipeError: in place of any other Exception, which is its cause.
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            remedy = remedy or "free some space and start again"
        raise RecipeError(f"{doing} failed ({sentence(error)})" + (f"; {remedy}" if remedy else "")) from error


@contextmanager
def exit_with_sentence(debug: bool = False, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn any error into one line on stderr: exit status 2 for what a user can act on, 1 for what can only be a bug of ours.

    Of several processes on one machine only the first prints.

    Args:
        debug: whether the traceback is shown above the sentence.
        passing: exceptions that are none of this function's business, such as those of a command line's parser.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        message, status = _told(error)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            if debug:
                traceback.print_exception(error)
            print(f"error: {message}", file=sys.stderr)
        _tell_starter(status)
        raise SystemExit(status) from None


def exit_stopped(what: str) -> NoReturn:
    """End as Ctrl-C ends a command, with one line on stderr; `what` says what stays and how to go on.

    The first of several processes alone prints, and none where a chain of commands has started it, which says its own.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0" and STATUS_FILE not in os.environ:
        print(f"stopped; {what}", file=sys.stderr)
    raise SystemExit(STOPPED) from None


def _tell_starter(status: int) -> None:
    """Of several processes the first that fails counts: others then fail at its silence."""
    if told := os.environ.get(STATUS_FILE):
        with suppress(OSError), open(told, "x", encoding="utf-8") as file:
            file.write(str(status))


def _told(error: Exception) -> tuple[str, int]:
    if isinstance(error, RecipeError):
        return str(error), 2
    if isinstance(error, OSError) and error.errno is not None:
        remedy = "; free some space and start again, a training with --resume" if error.errno in _FULL else ""
        return f"{error.filename or 'a file of the run'}: {os.strerror(error.errno)}{remedy}", 2
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return f"memory does not suffice ({sentence(error)}); lower the batch size or the length, or take a machine with more", 2
    return (
        f"{type(error).__name__} ({sentence(error)}) in {_place(error)}: a bug of this program and not of what it was given; "
        "run the command again with --debug to see the traceback, and report it"
    ), 1


def _place(error: Exception) -> str:
    """The last line of our own that the error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _is_ours(Path(frame.filename))] or frames
    return f"{Path(ours[-1].filename).name}, line {ours[-1].lineno}"


def _is_ours(file: Path) -> bool:
    return file.is_relative_to(_ROOT) and "site-packages" not in file.relative_to(_ROOT).parts
