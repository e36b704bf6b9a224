"""Stream of bytes from the thread that encodes them to the event loop that sends them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from threading import Condition

from handlers.serving.errors import RequestError

BOUND = 1_000_000
"""Unread bytes above which the writer waits."""


class Stream:
    """A file that is read while it is written. Only the writer waits; the reader gets futures."""

    def __init__(self, begin: Callable[[], None]) -> None:
        """Create an empty stream. `begin` is called with the first bytes, unless the stream has failed before."""
        self._begin: Callable[[], None] | None = begin
        self._changed = Condition()
        self._unread = bytearray()
        self._reader: Future[bytes] | None = None
        """Future that `read` has returned and that has no result yet."""
        self._ended = False
        self._error: BaseException | None = None

    def write(self, data: bytes) -> int:
        """Add bytes as soon as there is room. Raise the error of a stream that failed or was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or len(self._unread) < BOUND)
            self._check()
            if self._begin:
                self._begin()
                self._begin = None
            self._unread += data
            self._notify_reader()
        return len(data)

    def end(self) -> None:
        """Mark the end of the file."""
        with self._changed:
            self._ended = True
            self._notify_reader()

    def fail(self, error: BaseException) -> None:
        """Break the stream: reads and writes raise `error` once all bytes are read. The first error wins."""
        if not isinstance(error, Exception):  # it ends this thread, and must not end the event loop
            error = RequestError("the thread that writes this stream has ended", 503)
        with self._changed:
            if not self._ended:
                self._error = self._error or error
            self._notify_reader()
            self._changed.notify_all()

    def close(self) -> None:
        """Tell the writer that the reader has left: later writes raise an error."""
        with self._changed:
            self._ended = False
        self.fail(RequestError("nobody reads this stream any more"))

    def check(self) -> None:
        """Raise the error of a stream that failed."""
        with self._changed:
            self._check()

    def read(self) -> Future[bytes]:
        """Return a future of the next bytes, which are empty at the end. One read may wait at a time."""
        with self._changed:
            reader = self._reader = Future()
            self._notify_reader()
        return reader

    def _check(self) -> None:
        if self._error:
            raise self._error

    def _notify_reader(self) -> None:
        if self._reader is None or not (self._unread or self._ended or self._error):
            return
        reader, self._reader = self._reader, None
        with suppress(InvalidStateError):  # the reader has cancelled it
            if self._unread or self._ended:
                reader.set_result(bytes(self._unread))
                self._unread.clear()
                self._changed.notify_all()
            else:
                reader.set_exception(self._error)
