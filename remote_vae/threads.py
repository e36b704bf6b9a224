"""Calls in threads that do not keep Python alive."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def start_thread(call: Callable[[], T]) -> Future[T]:
    """Run a call in a daemon thread, which Python does not wait for at its end as it does for an executor's."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # any error is for the reader of the future
            future.set_exception(error)

    Thread(target=run, name="remote_vae", daemon=True).start()
    return future
