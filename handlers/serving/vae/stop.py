"""Stop a pass whose result nobody waits for any more: between two modules of the model, or two chunks of rows.

A thread cannot be interrupted from outside, so a pass looks by itself whether it is wanted. Between two looks it runs
one operation of torch, or a few, which end by themselves. A look asks nothing of the device and takes a few
microseconds of a core. The values stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn


class PassStopped(Exception):
    """Nobody waits for the result of this pass any more."""


_is_unwanted: ContextVar[Callable[[], bool]] = ContextVar("is_unwanted", default=lambda: False)
"""Of the pass that this thread runs; each thread has its own."""


@contextmanager
def stoppable(is_unwanted: Callable[[], bool]) -> Iterator[None]:
    """End a pass in the `with` block with `PassStopped`, soon after `is_unwanted` becomes true."""
    token = _is_unwanted.set(is_unwanted)
    try:
        yield
    finally:
        _is_unwanted.reset(token)


def check_wanted(*_: Any) -> None:
    """Raise `PassStopped` where nobody waits for the pass that this thread runs. Takes what a hook is given."""
    if _is_unwanted.get()():
        raise PassStopped


def make_stoppable(model: nn.Module) -> None:
    """Have every module of a model look before each of its calls, in all modes."""
    for module in model.modules():
        module.register_forward_pre_hook(check_wanted)
