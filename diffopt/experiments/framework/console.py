"""Where the commands print: what they say appears as it is written, in tables whose long cells are broken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def plain_console() -> Console:
    """A console for which brackets are no markup (``time [ms]``), colons no emoji, and numbers nothing to colour."""
    return Console(highlight=False, markup=False, emoji=False)


def grid(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
    align: str = "l",
    whole: int = 0,
    styles: Sequence[str | None] = (),
) -> Table:
    """A table as wide as the terminal, for cells that are too long for :func:`diffopt.reports.table`.

    Args:
        columns: the header.
        rows: the cells.
        title: what stands above it.
        align: for each column ``l`` or ``r``, to which side; the last letter holds for all columns that follow.
        whole: how many columns, from the left, are never broken: names that are to be copied.
        styles: how each row looks, in the words of rich.
    """
    found = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, (column, side) in enumerate(zip(columns, align.ljust(len(columns), align[-1]), strict=True)):
        found.add_column(column, justify="right" if side == "r" else "left", overflow="fold", no_wrap=i < whole)
    for i, row in enumerate(rows):
        found.add_row(*row, style=styles[i] if styles else None)
    return found
