"""Tables on a screen of any width: no number is cut, nor broken off at the end of a line."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Column, Table
from rich.text import Text

_FRAME = 3
"""What a column takes beside its text, and the table one more."""


@dataclass(frozen=True)
class ShownTable:
    """What `console.print` shows as a table, or, where the screen is too narrow for its words, as a table of two columns a row.

    Args:
        cells: by row, the titles of the columns first.
        title: stands above it.
        right: columns whose cells end below one another.
    """

    cells: Sequence[Sequence[str]]
    title: str = ""
    right: Collection[int] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        titles, *rows = self.cells
        widths = self._widths(options.max_width)
        if widths is None:
            yield Text(self.title, style="table.title")
            for row in rows:
                one = pairs()
                for told in zip(titles, row, strict=True):
                    one.add_row(*told)
                yield one
            return
        table = Table(title=self.title or None, title_justify="left")
        for column, (title, width) in enumerate(zip(titles, widths, strict=True)):
            table.add_column(title, width=width, justify="right" if column in self.right else "left")
        for row in rows:
            table.add_row(*row)
        yield table

    def _widths(self, screen: int) -> list[int] | None:
        """Of the columns, for which Rich would cut words though there is room for all; None where there is not."""
        columns = list(zip(*self.cells, strict=True))
        widths = [max(cell_len(word) for cell in column for word in ["", *cell.split()]) for column in columns]
        wanted = [max(map(cell_len, column)) for column in columns]
        left = screen - sum(widths) - _FRAME * len(columns) - 1
        if left < 0:
            return None
        while left and widths != wanted:
            short = max(range(len(columns)), key=lambda column: wanted[column] - widths[column])
            widths[short] += 1
            left -= 1
        return widths


def pairs(title: str | None = None) -> Table:
    """A table of two columns without a heading; a path that is longer than its column goes on in the next line."""
    return Table(Column(overflow="fold"), Column(overflow="fold"), title=title, show_header=False, title_justify="left")
