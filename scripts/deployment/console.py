"""Where things are printed: results on standard output, failures on standard error."""

from __future__ import annotations

from datetime import timedelta

from rich.console import Console

# A pipe or a log has no width: long lines, such as URLs, stay whole there.
WIDTH = 160
out = Console(highlight=False, width=None if Console().is_terminal else WIDTH)
err = Console(highlight=False, stderr=True, soft_wrap=True)


def say(text: str) -> None:
    """One line of the user's own words (no markup), never broken."""
    out.print(text, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """The same on standard error: what is being waited for, or went wrong."""
    err.print(text, markup=False)


def elapsed(seconds: float) -> str:
    """`4:05` for 245 seconds."""
    return str(timedelta(seconds=int(seconds)))[2:].removeprefix("0") if seconds < 3600 else f"{seconds / 3600:.1f} h"


def megabytes(size: int) -> str:
    """A size in bytes for people: `5.3 kB`, `167.7 MB`."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
