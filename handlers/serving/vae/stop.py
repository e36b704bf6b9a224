"""Stopping of a pass whose result nobody waits for any more, between two modules or two groups of rows.

A thread cannot be interrupted from outside, so a pass checks by itself. Between two checks it runs a few operations of
torch. A check takes a few microseconds of a core, nothing of the device, and changes no value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn


class PassStopped(Exception):
    """Exception that ends a pass whose result nobody waits for."""


_is_unwanted: ContextVar[Callable[[], bool]] = ContextVar("is_unwanted", default=lambda: False)
"""Function that tells whether nobody waits for the pass of this thread."""


@contextmanager
def stoppable(is_unwanted: Callable[[], bool]) -> Iterator[None]:
    """Let a `with` block end with `PassStopped` soon after `is_unwanted` returns True."""
    token = _is_unwanted.set(is_unwanted)
    try:
        yield
    finally:
        _is_unwanted.reset(token)


def check_wanted(*_: Any) -> None:
    """Raise `PassStopped` if nobody waits for the pass of this thread. It takes any arguments, to be a hook."""
    if _is_unwanted.get()():
        raise PassStopped


def make_stoppable(model: nn.Module) -> None:
    """Add a check before each call of every module of a model, in all modes."""
    for module in model.modules():
        module.register_forward_pre_hook(check_wanted)
