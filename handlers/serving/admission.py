"""What requests may have in memory at a time: counted before it is taken, given back once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from handlers.serving.limits import Limits


class BytesInFlight:
    """The bytes of all requests in the service: their bodies, and what is made of them. Any thread may use it."""

    def __init__(self) -> None:
        self.total = 0
        self.lock = Lock()

    def reservation(self, limits: Limits) -> Reservation:
        """A new request's share of them, empty yet."""
        return Reservation(self, limits)


class Reservation:
    """The bytes in flight of one request.

    The exchange gives them back at its end. What a thread has made of the body stays counted until the thread ends,
    which may be later where a deadline left it behind.
    """

    def __init__(self, in_flight: BytesInFlight, limits: Limits) -> None:
        self.size = 0
        self._in_flight, self._limits = in_flight, limits
        self._made = 0
        """Bytes that were counted within `reading`."""
        self._is_read = self._is_released = False

    def hold(self, size: int) -> None:
        """Count so many more bytes of this request, before they are taken.

        Raises:
            RequestError: it takes too much by itself (413), or beside the other requests (503); nothing is counted.
        """
        with self._in_flight.lock:
            self._limits.check_held(self._in_flight.total + size, self.size + size)
            self._count(size)
            self._made += size if self._is_read else 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around the thread that reads the payload."""
        self._is_read = True
        try:
            yield
        finally:
            with self._in_flight.lock:
                self._is_read = False
                if self._is_released:
                    self._count(-self.size)

    def release(self) -> None:
        """Give back the request's bytes, but those of a thread that still runs."""
        with self._in_flight.lock:
            self._is_released = True
            self._count(-(self.size - self._made if self._is_read else self.size))

    def _count(self, size: int) -> None:
        self.size += size
        self._in_flight.total += size
