"""What a value on the command line should have been is said in words of ours, whatever the library underneath says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from recipes.common import cli
from recipes.common.values import expected


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER")],
    number: Annotated[int, typer.Argument(metavar="NUMBER")] = 1,
    steps: Annotated[int, typer.Option(min=1, max=9)] = 1,
    rate: Annotated[float | None, typer.Option(min=0)] = None,
    kind: Annotated[Literal["a", "b"] | None, typer.Option()] = None,
) -> None:
    """A command."""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("there x", "error: NUMBER is x; expected a whole number; command --help tells more"),
        ("there --steps 10", "error: --steps is 10; expected a whole number from 1 to 9;"),
        ("there --steps 1.5", "error: --steps is 1.5; expected a whole number from 1 to 9;"),
        ("there --rate -1", "error: --rate is -1; expected a number, at least 0;"),
        ("there --rate=", "error: --rate is ''; expected a number, at least 0;"),
        ("there --kind c", "error: --kind is c; expected one of a, b;"),
        ("there --step 1", "No such option"),
        ("", "Missing argument"),
    ],
)
def test_a_wrong_value_is_told_with_what_was_expected(words: str, told: str) -> None:
    done = CliRunner().invoke(cli.app(command), words.split())
    assert done.exit_code == 2 and told in done.stderr, done.stderr


def test_types_and_bounds_in_words() -> None:
    assert expected(int | None, 2) == "a whole number, at least 2" and expected(float, None, 3) == "a number, at most 3"
    assert expected(Path) == "a path" and expected(bool) == "another value" and expected(list[int], 1, 2) == "a whole number from 1 to 2"
