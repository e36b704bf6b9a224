"""The output of commands: results on standard output, the rest on standard error, and one line for a failure."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import typer
from huggingface_hub import get_token
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from remote_vae import RemoteVAEError

WIDTH = 160
"""Columns of a pipe or a log, which have no width of their own. Long lines such as URLs stay whole."""
out = Console(highlight=False, width=None if Console().is_terminal else WIDTH)
say = partial(out.print, markup=False, soft_wrap=True)
"""Print a line on standard output without breaking it."""
note = partial(Console(highlight=False, stderr=True).print, markup=False, soft_wrap=True)
"""Print a line on standard error: progress, a warning or an error."""


class DeployError(Exception):
    """A failure that the user can mend, described in one line."""


FAILURES = (DeployError, RemoteVAEError)
"""Exceptions that a user can mend. Any other exception is a fault of this project."""


def describe(error: BaseException) -> str:
    """Return the text of an exception and its notes, in one line."""
    return "; ".join(filter(None, [str(error), *getattr(error, "__notes__", [])]))


def reports_failures(function: Callable[..., None]) -> Callable[..., None]:
    """Let a command end with one line on standard error: status 1 for a failure, 130 for Ctrl-C."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        hub_logging.set_verbosity_error()
        try:
            return function(*args, **kwargs)
        except FAILURES as error:
            status, message = 1, f"error: {describe(error)}"
        except KeyboardInterrupt as stop:
            state = describe(stop) or "nothing was changed"
            status, message = 130, f"stopped: {state}; run the same command again to continue"
        gc.collect()  # ends the line of a progress bar that the failure left open
        note(message.replace(token, "***") if (token := get_token()) else message)
        raise typer.Exit(status)

    return run


@contextmanager
def if_stopped(state: str) -> Iterator[None]:
    """Add a note on the remaining state to a Ctrl-C inside the block."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(state)
        raise


def show_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table. A narrow terminal wraps its lines, so a URL in the last column can be copied whole."""
    headers = (Column(name, overflow="fold") for name in columns)
    table = Table(*headers, box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False, width=max(out.width, WIDTH)).print(table)
