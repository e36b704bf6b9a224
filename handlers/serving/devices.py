"""The devices of a process: one queue of jobs for all models, and one thread for each device."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from time import monotonic
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from handlers.serving import metrics
from handlers.serving.errors import RequestError
from handlers.serving.vae.heap import HEAP, map_gpu_memory
from handlers.serving.vae.stop import PassStopped, stoppable
from handlers.serving.vae.vae import VAE

T = TypeVar("T")

logger = logging.getLogger(__name__)


IDLE_SECONDS = 10.0
"""Seconds without work after which a device gives back the memory that it keeps for the next batch."""

BATCH_PIXELS = 1024 * 1024
"""Pixels of a batch on a GPU, at most: four images of 512x512, each of which alone leaves a large GPU partly idle.

A CPU is busy with one image, so its batches hold one request.
"""


class Device(NamedTuple):
    run: Callable[[list[Any]], list[Any]]
    """Runs a batch of work and gives its results in order."""
    is_alive: Callable[[], bool]
    """Whether it can still compute anything; asked when a batch failed."""
    on_idle: Callable[[], None]
    """Gives back the memory that it keeps for the next batch."""


class JobFuture(Future[T]):
    """The result of a job. Cancelling it drops a job that waits. A pass stops when all its jobs are cancelled."""

    given_up = False
    """Whether nobody waits for the result any more."""

    def cancel(self) -> bool:
        self.given_up = True
        return super().cancel()


@dataclass(eq=False)
class Job:
    """Work for the device. Waiting jobs of the same `key` may be run as one batch; `size` counts towards its limit."""

    work: Any
    key: Hashable
    size: int
    due: float
    """When it came, plus the time that it will take, up to a tenth of the deadline: so small work passes large work,
    which yet gets its turn."""
    future: JobFuture[Any] = field(default_factory=JobFuture)


class DeviceQueue:
    """Runs jobs on devices, each one batch at a time.

    A batch is what waits when a device becomes free, so no job ever waits for company.
    """

    def __init__(self, devices: Sequence[Device], batch_limit: int, timeout: float) -> None:
        """Starts the threads.

        Args:
            batch_limit: what the sizes of the jobs of a batch add up to at most; a larger job goes alone.
            timeout: seconds that a client waits; a device that is busy with one batch for twice as long is stuck.
        """
        self._batch_limit = batch_limit
        self._timeout = timeout
        self._waiting: list[Job] = []
        self._arrival = threading.Condition()
        self._batches: dict[int, tuple[float, list[Job]]] = {}
        """By device: what it runs, and since when."""
        self._idle_tasks: list[deque[Callable[[], None]]] = [deque() for _ in devices]
        """By device: what it does by itself while nothing waits."""
        self._alive = set(range(len(devices)))
        self._problem: str | None = None
        self._closing = False
        self._seconds_per_size = 0.0
        for number, device in enumerate(devices):
            threading.Thread(target=self._serve, args=(number, device), name=f"device-{number}", daemon=True).start()

    @property
    def running(self) -> int:
        """Jobs on a device."""
        return sum(len(batch) for _, batch in list(self._batches.values()))

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        with self._arrival:
            self._forget_cancelled()
            return len(self._waiting)

    @property
    def problem(self) -> str | None:
        """Why this replica should get no more requests; None while all is well."""
        if self._closing:
            return "the service is shutting down"
        started = [start for start, _ in list(self._batches.values())]
        if started and monotonic() - min(started) > 2 * self._timeout:
            return "a device is stuck"
        return self._problem

    def check_open(self) -> None:
        """Raises `RequestError`, status 503, where work that is submitted now would not be taken."""
        if self._closing or not self._alive:
            raise RequestError(f"{self.problem}; try again soon", 503)

    def submit(self, work: Any, key: Hashable, size: int, future: JobFuture[Any] | None = None) -> JobFuture[Any]:
        """Queue work.

        Args:
            future: of its result, where the work may set it before its batch is done.

        Raises:
            RequestError: no device is left; status 503.
        """
        with self._arrival:
            if not self._alive:
                self.check_open()
            due = monotonic() + min(size * self._seconds_per_size, self._timeout / 10)
            job = Job(work, key, size, due, future or JobFuture())
            self._waiting.append(job)
            self._arrival.notify()
        return job.future

    def when_idle(self, number: int, idle_task: Callable[[], None]) -> None:
        """Has a device do something of its own as soon as no job waits."""
        with self._arrival:
            self._idle_tasks[number].append(idle_task)
            self._arrival.notify_all()

    def close(self) -> None:
        """`check_open` lets in no more work. Safe in a signal handler."""
        self._closing = True

    def _forget_cancelled(self) -> None:
        self._waiting = [job for job in self._waiting if not job.future.cancelled()]

    def _serve(self, number: int, device: Device) -> None:
        """A device's thread: a batch at a time, for as long as the device lives."""
        is_idle = True
        try:
            while True:
                batch = self._next(number, None if is_idle else IDLE_SECONDS)
                if is_idle := batch is None:
                    device.on_idle()
                elif isinstance(batch, list):
                    is_whole = _run(device, batch)
                    start, _ = self._batches.pop(number)
                    seconds = monotonic() - start
                    if is_whole:
                        self._learn_speed(seconds, sum(job.size for job in batch))
                    else:
                        logger.info("device %d stopped a pass after %.1f s: nobody waits for it", number, seconds)
                else:
                    batch()
        except BaseException:  # the device or this code: whatever it is, no client waits for it, and /health says so
            logger.exception("device %d is lost", number)
            self._problem = f"device {number} is lost"
            self._alive.discard(number)
            _, jobs = self._batches.pop(number, (0, []))
            if not self._alive:
                with self._arrival:
                    jobs, self._waiting = jobs + self._waiting, []
            for job in jobs:
                _fail(job, RequestError(f"{self._problem}; try again soon", 503))

    def _next(self, number: int, timeout: float | None) -> list[Job] | Callable[[], None] | None:
        """The job that is due first, and those that go with it, marked as running; an idle task where none waits.

        None where neither came within so many seconds.
        """
        with self._arrival:
            if not self._arrival.wait_for(lambda: self._waiting or self._idle_tasks[number], timeout):
                return None
            if not self._waiting:
                return self._idle_tasks[number].popleft()
            self._waiting.sort(key=lambda job: job.due)
            first, size = self._waiting[0], 0
            batch = []
            for job in list(self._waiting):
                if job is first or (job.key == first.key and size + job.size <= self._batch_limit):
                    self._waiting.remove(job)
                    size += job.size
                    if job.future.set_running_or_notify_cancel():
                        batch.append(job)
            self._batches[number] = (monotonic(), batch)
            return batch

    def _learn_speed(self, seconds: float, size: int) -> None:
        """A running mean, in which the last few batches count."""
        if size:
            known = self._seconds_per_size
            self._seconds_per_size += (seconds / size - known) * (0.2 if known else 1)


def _run(device: Device, batch: list[Job]) -> bool:
    """Run a batch; when that fails, each of its jobs alone, so that one cannot fail another.

    Returns:
        Whether it was run to its end; not where a pass was stopped.

    Raises:
        BaseException: the device is lost; jobs of the batch that have no answer yet are the caller's.
    """
    if not batch:
        return True
    futures = [job.future for job in batch]
    try:
        with stoppable(lambda: all(map(_is_given_up, futures))):
            results = device.run([job.work for job in batch])
        assert len(results) == len(batch)
    except PassStopped:
        metrics.STOPPED.inc()
        for job in batch:
            _fail(job, PassStopped())  # a new one: the traceback of the other holds this batch
        return False
    except Exception as error:
        if not isinstance(error, RequestError) and not device.is_alive():
            raise
        if len(batch) == 1:
            _fail(batch[0], error)
            return True
        wholes = [_run(device, [job]) for job in batch]  # all of them, whatever becomes of one
        return all(wholes)
    for job, result in zip(batch, results, strict=True):
        with suppress(InvalidStateError):
            job.future.set_result(result)
    return True


_is_given_up = attrgetter("given_up")


def _fail(job: Job, error: Exception) -> None:
    with suppress(InvalidStateError):
        job.future.set_exception(error)


class DevicePipeline(Protocol):
    """A pipeline, as far as devices are concerned."""

    vaes: list[VAE]
    """One for each device."""

    def forward(self, vae: VAE, batch: list[Any]) -> list[Any]:
        """Run the work of a batch. Return its results in order."""


class DevicePool:
    """All devices. Each runs one batch of one model at a time, so passes never compete for a device's memory."""

    def __init__(self, devices: Sequence[torch.device], timeout: float) -> None:
        """`timeout` are the seconds that a request may take; see `DeviceQueue`."""
        self.queue = DeviceQueue(
            [
                Device(partial(self._run, number), partial(self._is_alive, number), HEAP.trim)
                for number in range(len(devices))
            ],
            0 if devices[0].type == "cpu" else BATCH_PIXELS,
            timeout,
        )
        self._running: dict[int, DevicePipeline] = {}

    def submit(
        self, pipeline: DevicePipeline, work: Any, key: Hashable, size: int, future: JobFuture[Any]
    ) -> JobFuture[Any]:
        """Queue work for `pipeline.forward`. Jobs of one pipeline and key may be one batch."""
        return self.queue.submit((pipeline, work), (id(pipeline), key), size, future)

    def _run(self, number: int, batch: list[tuple[DevicePipeline, Any]]) -> list[Any]:
        pipeline = self._running[number] = batch[0][0]
        return pipeline.forward(pipeline.vaes[number], [work for _, work in batch])

    def _is_alive(self, number: int) -> bool:
        return self._running[number].vaes[number].is_alive()


def device_names(device: str | None) -> list[str]:
    """Return the names of the devices to run on: `device`, or every GPU, or the CPU.

    Raises:
        ValueError: it is no device of this machine.
    """
    map_gpu_memory()
    if device:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"VAE_DEVICE: torch cannot use {device!r} here ({reason})") from None
        return [device]
    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["mps" if torch.backends.mps.is_available() else "cpu"]
