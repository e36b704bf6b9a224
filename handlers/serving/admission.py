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
    """Slots, readers, deadlines and bytes in flight of all requests to all models.

    Slots, readers and deadlines are for the event loop. Any thread may count bytes.
    """

    def __init__(self, limits: Limits, devices: int = 1) -> None:
        self.limits = limits
        self.slots = asyncio.Semaphore(limits.max_queue + devices)
        self.readers = asyncio.Semaphore(os.cpu_count() or 1)
        """Permits to read a payload, which keeps a core busy."""
        self.bytes_in_flight = 0
        """Bytes of the bodies of all requests, and of the tensors made from them."""
        self.lock = Lock()
        self._deadlines: set[anyio.CancelScope] = set()

    def reservation(self) -> Reservation:
        """Return the empty reservation of a new request."""
        return Reservation(self)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Take a slot for a `with` block, first come, first served.

        Raises:
            RequestError: no slot is free within the queue timeout; status 503.
        """
        with anyio.move_on_after(self.limits.queue_timeout) as waiting:
            await self.slots.acquire()
        if waiting.cancelled_caught:
            limits = self.limits
            raise RequestError(
                f"no slot was free within {limits.queue_timeout:g} s (VAE_QUEUE_TIMEOUT): {limits.max_queue} requests "
                "wait already, besides those on a device (VAE_MAX_QUEUE); try again soon",
                503,
            )
        try:
            yield
        finally:
            self.slots.release()

    @contextmanager
    def deadline(self) -> Iterator[None]:
        """Cancel a `with` block at its deadline, with `TimeoutError`."""
        with anyio.fail_after(self.limits.timeout) as scope:
            self._deadlines.add(scope)
            try:
                yield
            finally:
                self._deadlines.discard(scope)

    def expire(self) -> None:
        """Let all current deadlines pass now."""
        for scope in list(self._deadlines):
            scope.deadline = -math.inf


class Reservation:
    """Bytes in flight of one request. They are released when its last `with` block ends.

    The request is in one block, and the thread that reads its payload in another. So the bytes of an abandoned thread
    count until that thread ends.
    """

    def __init__(self, admission: Admission) -> None:
        self.size = 0
        self._admission = admission
        self._users = 0

    def reserve(self, size: int) -> None:
        """Count `size` more bytes of this request, before they are allocated.

        Raises:
            RequestError: the request exceeds the limit alone (413), or together with the others (503).
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
