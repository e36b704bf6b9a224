"""Bytes on their way from the thread that makes them to the event loop that sends them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from threading import Condition

from handlers.serving.errors import RequestError

BOUND = 1_000_000
"""Bytes that may wait for the reader; the writer waits while there are as many."""


class Stream:
    """A file that is read while it is written. Only the writer ever waits; the reader gets futures."""

    def __init__(self, begin: Callable[[], None]) -> None:
        """`begin` is called with the first bytes, unless the stream has failed before: then no byte is ever read."""
        self._begin: Callable[[], None] | None = begin
        self._changed = Condition()
        self._unread = bytearray()
        self._asked: Future[bytes] | None = None
        self._ended = False
        self._error: BaseException | None = None

    def write(self, data: bytes) -> int:
        """Adds bytes, as soon as there is room for them. Raises what the stream has failed with, or its reader left."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or len(self._unread) < BOUND)
            self._check()
            if self._begin:
                self._begin()
                self._begin = None
            self._unread += data
            self._answer()
        return len(data)

    def end(self) -> None:
        """Nothing more will be written."""
        with self._changed:
            self._ended = True
            self._answer()

    def fail(self, error: BaseException) -> None:
        """The bytes that are there are all; whoever reads or writes later gets this error. The first one counts."""
        if not isinstance(error, Exception):  # which would end the event loop, as it ends this thread
            error = RequestError("the thread that writes this stream has ended", 503)
        with self._changed:
            if not self._ended:
                self._error = self._error or error
            self._answer()
            self._changed.notify_all()

    def close(self) -> None:
        """The reader leaves; what is written from now on is dropped with an error."""
        with self._changed:
            self._ended = False
        self.fail(RequestError("nobody reads this stream any more"))

    def check(self) -> None:
        """Raises what the stream has failed with, if it has."""
        with self._changed:
            self._check()

    def read(self) -> Future[bytes]:
        """The bytes that are there, as soon as there are some; none at the end. One at a time is asked for."""
        with self._changed:
            self._asked = Future()
            asked = self._asked
            self._answer()
        return asked

    def _check(self) -> None:
        if self._error:
            raise self._error

    def _answer(self) -> None:
        if self._asked is None or not (self._unread or self._ended or self._error):
            return
        asked, self._asked = self._asked, None
        with suppress(InvalidStateError):  # the reader has given it up
            if self._unread or self._ended:
                asked.set_result(bytes(self._unread))
                self._unread.clear()
                self._changed.notify_all()
            else:
                asked.set_exception(self._error)
