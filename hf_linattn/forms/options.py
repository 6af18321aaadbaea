"""Checks of single options, each answered in one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"linattn option {name}={value!r} is unknown; give one of {', '.join(map(repr, choices))}.")


def require_number(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a number, ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"linattn option {name} must be a number, not {value!r}.")
    if not -math.inf < value < math.inf:  # math.isfinite cannot be traced by torch 2.11 where Dynamo takes a number for dynamic
        raise ValueError(f"linattn option {name} must be finite, not {value}.")


def require_bool(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"linattn option {name} must be true or false, not {value!r}.")


def require_count(name: str, value: Any, least: int) -> None:
    """Raises TypeError unless `value` is a whole number, ValueError unless it is `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"linattn option {name} must be a whole number, not {value!r}.")
    if value < least:
        raise ValueError(f"linattn option {name} must be {least} or more, not {value}.")
