"""Text from a server: made safe to print, and parsed as the shape in a header."""

from __future__ import annotations

import json


def visible(text: str) -> str:
    """Return the text with every character that a terminal may obey, or that is invisible, as an escape (`\\x1b`).

    These are control characters, marks that change the direction of writing, and blanks other than a space.
    """
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)


def read_shape(text: str) -> list[int]:
    """Return the shape in a response's header.

    Raises:
        ValueError: it is no JSON list of 1 to 6 sizes above 0.
    """
    try:
        shape = json.loads(text)
    except (ValueError, RecursionError):
        shape = None
    if not isinstance(shape, list) or not 1 <= len(shape) <= 6 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"its `shape` {text[:60]!r} is not a list of sizes" if text else "it has no header `shape`")
    return shape
