"""Tables on screens of any width have every number, and none that goes on in another line."""

import re

import pytest
from rich.console import Console

from recipes.common.tables import ShownTable, pairs

NUMBERS = ["1,234,567,890", "-0.0123", "+0.300 ± 0.200", "150 tokens", "87.5%", "123.45 (50%)", "1.2e-08"]


def shown(table, width):
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    return lines


def words(text):
    return re.findall(r"[^\s│┃]+", text)


@pytest.mark.parametrize("columns", [1, 5, 6, 7, 30])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_number_is_cut(width, columns):
    cells = [[f"{number}{column}" for column, number in zip(range(columns), 5 * NUMBERS, strict=False)] for _ in range(3)]
    titles = [f"nats a token after {column}" for column in range(columns)]
    lines = shown(ShownTable([titles, *cells], "what was found", right=range(2, columns)), width)
    there = [word for line in lines for word in words(line)]
    for row in [titles, *cells]:
        for cell in row:
            for word in words(cell):
                assert word in there
                there.remove(word)


def test_a_wide_screen_shows_one_table():
    lines = shown(ShownTable([["model", "KL"], ["a", "0.1"], ["b", "0.2"]], "near"), 80)
    assert len(lines) == 7 and lines[0].rstrip() == "near"


def test_a_row_after_the_other_where_the_screen_is_narrow():
    lines = shown(ShownTable([["model", "KL", "loss"], ["a", "0.1", "2.5"], ["b", "0.2", "2.75"]], "near"), 20)
    told = [["model", "a"], ["KL", "0.1"], ["loss", "2.5"], ["model", "b"], ["KL", "0.2"], ["loss", "2.75"]]
    assert [words(line) for line in lines if "│" in line] == told


def test_a_long_path_goes_on():
    table = pairs("a title")
    table.add_row("path", "/out" * 30)
    assert "".join(word for line in shown(table, 40) for word in words(line) if "/" in word or "out" in word) == "/out" * 30
