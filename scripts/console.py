"""What commands print, results on standard output and the rest on standard error, and how they end."""

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
"""Columns of a pipe or a log, which have no width: long lines, such as URLs, stay whole there."""
out = Console(highlight=False, width=None if Console().is_terminal else WIDTH)
say = partial(out.print, markup=False, soft_wrap=True)
"""Prints a line, never broken."""
note = partial(Console(highlight=False, stderr=True).print, markup=False, soft_wrap=True)
"""The same on standard error: what is being waited for, or went wrong."""


class DeployError(Exception):
    """What went wrong and what to do about it, in one line."""


FAILURES = (DeployError, RemoteVAEError)
"""What a user can do something about; anything else is a fault of this project's."""


def describe(error: BaseException) -> str:
    """What it says, and what was noted on it on its way, in one line."""
    return "; ".join(filter(None, [str(error), *getattr(error, "__notes__", [])]))


def ends_in_one_line(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose failures end it with one line on standard error and status 1, and Ctrl-C with status 130."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        hub_logging.set_verbosity_error()
        try:
            return function(*args, **kwargs)
        except FAILURES as error:
            status, message = 1, f"error: {describe(error)}"
        except KeyboardInterrupt as stop:
            left = describe(stop) or "nothing was changed"
            status, message = 130, f"stopped: {left}; the same command again goes on from there"
        gc.collect()  # a progress bar that the failure left open ends its line here
        note(message.replace(token, "***") if (token := get_token()) else message)
        raise typer.Exit(status)

    return run


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
