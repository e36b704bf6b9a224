"""What requests may have in memory at a time: counted before it is taken, given back once."""

from __future__ import annotations

from threading import Lock
from typing import Self

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
    """The bytes in flight of one request, given back when the last `with` block of it ends.

    An exchange is in one such block, and the thread that reads its payload in another. So the bytes of a thread that
    a deadline left behind count until it ends.
    """

    def __init__(self, in_flight: BytesInFlight, limits: Limits) -> None:
        self.size = 0
        self._in_flight, self._limits, self._users = in_flight, limits, 0

    def hold(self, size: int) -> None:
        """Count so many more bytes of this request, before they are taken.

        Raises:
            RequestError: it takes too much by itself (413), or beside the other requests (503); nothing is counted.
        """
        with self._in_flight.lock:
            self._limits.check_held(self._in_flight.total + size, self.size + size)
            self._in_flight.total += size
            self.size += size

    def __enter__(self) -> Self:
        with self._in_flight.lock:
            self._users += 1
        return self

    def __exit__(self, *error: object) -> None:
        with self._in_flight.lock:
            self._users -= 1
            if not self._users:
                self._in_flight.total -= self.size
                self.size = 0
