"""Text that a server sends: safe to print, and the shape in a header."""

from __future__ import annotations

import json


def visible(text: str) -> str:
    """The text with every character that a terminal may obey, or that hides, written as an escape such as `\\x1b`.

    These are control characters, the marks that turn the direction of writing, and blanks other than a space.
    """
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)


def read_shape(text: str) -> list[int]:
    """The shape in a response's header.

    Raises:
        ValueError: it is no JSON list of sizes above 0.
    """
    try:
        shape = json.loads(text)
    except (ValueError, RecursionError):
        shape = None
    if not isinstance(shape, list) or not 1 <= len(shape) <= 6 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"its `shape` {text[:60]!r} is no list of sizes" if text else "it has no header `shape`")
    return shape
