"""Where things are printed: results on standard output, failures on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

WIDTH = 160
"""Columns of a pipe or a log, which have no width: long lines, such as URLs, stay whole there."""
out = Console(highlight=False, width=None if Console().is_terminal else WIDTH)
say = partial(out.print, markup=False, soft_wrap=True)
"""Prints a line, never broken."""
note = partial(Console(highlight=False, stderr=True).print, markup=False, soft_wrap=True)
"""The same on standard error: what is being waited for, or went wrong."""


class DeployError(Exception):
    """What went wrong and what to do about it, in one line."""


def describe(error: BaseException) -> str:
    """What it says, and what was noted on it on its way, in one line."""
    return "; ".join(filter(None, [str(error), *getattr(error, "__notes__", [])]))


@contextmanager
def if_stopped(left: str) -> Iterator[None]:
    """Notes on a Ctrl-C inside what it leaves."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(left)
        raise


def show_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A narrow terminal wraps its lines, so that a URL in the last column can be copied whole."""
    headers = (Column(name, overflow="fold") for name in columns)
    table = Table(*headers, box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False, width=max(out.width, WIDTH)).print(table)
