"""The threads that run the VAE, one a device, and the queue in front of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from handlers.serving.errors import RequestError


@dataclass(eq=False)
class Job:
    """Work for the device. Waiting jobs of the same `key` may be run as one batch; `size` counts towards its limit."""

    work: Any
    key: Hashable
    size: int
    future: Future = field(default_factory=Future)


class DeviceWorkers:
    """Runs jobs in the order in which they came, each device one batch at a time.

    A batch is what waits when a device becomes free, so no job ever waits for company.
    """

    def __init__(self, devices: Sequence[Callable[[list[Any]], list[Any]]], batch_limit: int, queue_limit: int) -> None:
        """Starts the threads.

        Args:
            devices: for each device, what runs a batch of work on it and gives its results in order.
            batch_limit: what the sizes of the jobs of a batch add up to at most; a larger job goes alone.
            queue_limit: how many jobs may wait.
        """
        self._batch_limit = batch_limit
        self._queue_limit = queue_limit
        self._waiting: deque[Job] = deque()
        self._arrival = threading.Condition()
        self.running = 0
        """Jobs on a device."""
        for number, run in enumerate(devices):
            threading.Thread(target=self._serve, args=(run,), name=f"device-{number}", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        with self._arrival:
            self._forget_cancelled()
            return len(self._waiting)

    def submit(self, work: Any, key: Hashable, size: int) -> Future:
        """Queues work. Cancelling its future drops it, unless it has begun.

        Raises:
            RequestError: the queue is full; status 503.
        """
        job = Job(work, key, size)
        with self._arrival:
            self._forget_cancelled()
            if len(self._waiting) >= self._queue_limit:
                raise RequestError(f"{len(self._waiting)} requests are waiting already; try again soon", 503)
            self._waiting.append(job)
            self._arrival.notify()
        return job.future

    def _forget_cancelled(self) -> None:
        for job in [job for job in self._waiting if job.future.cancelled()]:
            self._waiting.remove(job)

    def _serve(self, run: Callable[[list[Any]], list[Any]]) -> None:
        while True:
            batch = [job for job in self._next_batch() if job.future.set_running_or_notify_cancel()]
            with self._arrival:
                self.running += len(batch)
            try:
                _run(run, batch)
            finally:
                with self._arrival:
                    self.running -= len(batch)

    def _next_batch(self) -> list[Job]:
        """The first job in the queue, and those behind it that go with it."""
        with self._arrival:
            self._arrival.wait_for(lambda: self._waiting)
            first = self._waiting.popleft()
            batch, size = [first], first.size
            for job in list(self._waiting):
                if job.key == first.key and size + job.size <= self._batch_limit:
                    self._waiting.remove(job)
                    batch.append(job)
                    size += job.size
            return batch


def _run(run: Callable[[list[Any]], list[Any]], batch: list[Job]) -> None:
    """Runs a batch; when that fails, each of its jobs alone, so that one cannot fail another."""
    if not batch:
        return
    try:
        results = run([job.work for job in batch])
        assert len(results) == len(batch)
    except BaseException as error:  # whatever it is belongs to the client, and the thread must go on
        if len(batch) == 1:
            batch[0].future.set_exception(error)
        else:
            for job in batch:
                _run(run, [job])
        return
    for job, result in zip(batch, results, strict=True):
        job.future.set_result(result)
