"""Where things are printed: results on standard output, failures on standard error."""

from __future__ import annotations

from datetime import timedelta

from rich.console import Console
from rich.table import Table

# A pipe or a log has no width: long lines, such as URLs, stay whole there.
WIDTH = 160
out = Console(highlight=False, width=None if Console().is_terminal else WIDTH)
err = Console(highlight=False, stderr=True, soft_wrap=True)


class DeployError(Exception):
    """What went wrong and what to do about it, in one line."""


def say(text: str) -> None:
    """One line of the user's own words (no markup), never broken."""
    out.print(text, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """The same on standard error: what is being waited for, or went wrong."""
    err.print(text, markup=False)


def make_table(*columns: str, show_header: bool = True) -> Table:
    table = Table(box=None, header_style="bold", show_header=show_header, padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_wide(table: Table) -> None:
    """Prints a table whose last column holds URLs: a narrow terminal wraps its rows, and a URL can be copied whole."""
    Console(highlight=False, width=max(out.width, WIDTH)).print(table)


def elapsed(seconds: float) -> str:
    """`4:05` for 245 seconds, `1.2 h`, `3 days`."""
    if seconds < 3600:
        return str(timedelta(seconds=int(seconds)))[2:].removeprefix("0")
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


def megabytes(size: int) -> str:
    """A size in bytes for people: `5.3 kB`, `167.7 MB`."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
