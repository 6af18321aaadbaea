"""The one kind of error that conversion reports: a sentence for the person who ran it."""

from __future__ import annotations

from recipes.common.errors import OptionError, stage
from recipes.common.errors import RecipeError as ConversionError

__all__ = ["ConversionError", "OptionError", "one_line", "stage"]


def one_line(error: BaseException, longest: int = 300) -> str:
    """The text of another error on one line, cut where it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else text[:longest] + " ..."
