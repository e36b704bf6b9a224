"""Admission of requests: slots, readers, bytes in flight and deadlines."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from threading import Lock
from typing import Self

import anyio

from handlers.serving.errors import RequestError
from handlers.serving.limits import Limits


class Admission:
    """Everything that bounds the requests in the service. One object serves all models.

    The event loop takes slots, readers and deadlines. Any thread may count bytes.
    """

    def __init__(self, limits: Limits, devices: int = 1) -> None:
        self.limits = limits
        self.slots = asyncio.Semaphore(limits.max_queue + devices)
        self.readers = asyncio.Semaphore(os.cpu_count() or 1)
        """Held while a payload is read, which keeps a core busy."""
        self.bytes_in_flight = 0
        """Bytes of the bodies of all requests, and of what is made of them."""
        self.lock = Lock()
        self._deadlines: set[anyio.CancelScope] = set()

    def reservation(self) -> Reservation:
        """Return a new request's share of the bytes in flight, which is empty."""
        return Reservation(self)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold one of the slots for a `with` block, first come, first served.

        Raises:
            RequestError: no slot is free within the queue timeout; status 503.
        """
        with anyio.move_on_after(self.limits.queue_timeout) as waiting:
            await self.slots.acquire()
        if waiting.cancelled_caught:
            limit = self.limits.max_queue
            raise RequestError(f"{limit} requests are waiting already (VAE_MAX_QUEUE); try again soon", 503)
        try:
            yield
        finally:
            self.slots.release()

    @contextmanager
    def deadline(self) -> Iterator[None]:
        """Cancel a `with` block at its deadline. Raises `TimeoutError` then."""
        with anyio.fail_after(self.limits.timeout) as scope:
            self._deadlines.add(scope)
            try:
                yield
            finally:
                self._deadlines.discard(scope)

    def expire(self) -> None:
        """Make every deadline of now pass."""
        for scope in list(self._deadlines):
            scope.deadline = -math.inf


class Reservation:
    """The bytes in flight of one request. They are given back when its last `with` block ends.

    A request is in one such block, and the thread that reads its payload in another. So the bytes of a thread that a
    deadline left behind count until that thread ends.
    """

    def __init__(self, admission: Admission) -> None:
        self.size = 0
        self._admission = admission
        self._users = 0

    def hold(self, size: int) -> None:
        """Count `size` more bytes of this request, before they are taken.

        Raises:
            RequestError: the request takes too much alone (413), or beside the others (503). Nothing is counted then.
        """
        admission = self._admission
        with admission.lock:
            admission.limits.check_in_flight(admission.bytes_in_flight + size, self.size + size)
            admission.bytes_in_flight += size
            self.size += size

    def __enter__(self) -> Self:
        with self._admission.lock:
            self._users += 1
        return self

    def __exit__(self, *error: object) -> None:
        with self._admission.lock:
            self._users -= 1
            if not self._users:
                self._admission.bytes_in_flight -= self.size
                self.size = 0
