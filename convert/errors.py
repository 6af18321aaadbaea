"""The one kind of error that conversion reports: a sentence for the person who ran it."""

from __future__ import annotations


class ConversionError(ValueError):
    """What was wrong, what was expected and what to do, in one sentence."""
