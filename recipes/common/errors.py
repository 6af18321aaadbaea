"""Errors a user can do something about: one sentence on the screen, exit status 2."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class RecipeError(Exception):
    """What was wrong, what was expected and what to do, in one sentence."""


def sentence(error: BaseException, limit: int = 300) -> str:
    """The first line of `error`'s message, cut to `limit` characters, for quoting a library's error inside one of ours."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:limit].rstrip(".")


@contextmanager
def exit_with_sentence() -> Iterator[None]:
    """Turn a `RecipeError`, or an `OSError` of the file system, into one line on stderr and exit status 2.

    Of several processes on one machine only the first prints.
    """
    try:
        yield
    except RecipeError as error:
        message = str(error)
    except OSError as error:
        if error.errno is None:
            raise
        message = f"{error.filename or 'a file of the run'}: {os.strerror(error.errno)}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message += "; free some space and start again with --resume"
    else:
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
