"""Devices of a process: a queue of jobs for all models, and a thread for each device."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
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
"""Seconds without work after which a device frees the memory that it keeps for the next batch."""

BATCH_PIXELS = 1024 * 1024
"""Pixels of a batch on a GPU, at most: four images of 512x512, because one alone leaves a large GPU partly idle.

One image keeps a CPU busy, so its batches have one request.
"""


class Device(NamedTuple):
    """Functions of a device."""

    run: Callable[[list[Any]], list[Any]]
    """Run a batch of work and return its results in order."""
    is_alive: Callable[[], bool]
    """Return whether the device still computes, after a batch has failed."""
    on_idle: Callable[[], None]
    """Free the memory that the device keeps for the next batch."""
    on_start: Callable[[], None] = lambda: None
    """Prepare the device's thread, before its first batch."""


class JobFuture(Future[T]):
    """Result of a job. Cancelling it drops a waiting job. A pass stops when all its jobs are cancelled."""

    is_cancelled = False
    """True if nobody waits for the result any more, also when the job runs already."""

    def cancel(self) -> bool:
        self.is_cancelled = True
        return super().cancel()


@dataclass(eq=False)
class Job:
    """Work for a device. Waiting jobs with the same `key` may become one batch; `size` counts towards its limit."""

    work: Any
    key: Hashable
    size: int
    due: float
    """Arrival plus expected duration, at most a tenth of the deadline. So small jobs overtake large ones, which still
    get their turn."""
    future: JobFuture[Any] = field(default_factory=JobFuture)


class IdleTask(NamedTuple):
    """Work for the time without jobs."""

    steps: Iterator[None]
    end: Future[None]
    """Future that is set when the steps are done, or the device is lost."""


class DeviceQueue:
    """Queue of jobs, and a thread for each device that runs one batch at a time.

    A device that becomes free takes the jobs that wait already, so no job waits for a batch to fill.
    """

    def __init__(self, devices: Sequence[Device], batch_limit: int, timeout: float) -> None:
        """Start the threads.

        Args:
            batch_limit: most that the sizes of a batch's jobs add up to; a larger job runs alone.
            timeout: seconds that a client waits. A device is stuck after twice as long in one batch.
        """
        self._batch_limit = batch_limit
        self._timeout = timeout
        self._waiting: list[Job] = []
        self._arrival = threading.Condition()
        self._batches: dict[int, tuple[float, list[Job]]] = {}
        """Start and jobs of the running batch, by device."""
        self._idle_tasks: list[deque[IdleTask]] = [deque() for _ in devices]
        """Tasks by device."""
        self._alive = set(range(len(devices)))
        self._problem: str | None = None
        self._closing = False
        self._seconds_per_size = 0.0
        for number, device in enumerate(devices):
            threading.Thread(target=self._serve, args=(number, device), name=f"device-{number}", daemon=True).start()

    @property
    def running(self) -> int:
        """Number of jobs on devices."""
        return sum(len(batch) for _, batch in list(self._batches.values()))

    @property
    def waiting(self) -> int:
        """Number of jobs in the queue."""
        with self._arrival:
            self._drop_cancelled()
            return len(self._waiting)

    @property
    def problem(self) -> str | None:
        """Reason why this replica must not get more requests, for `/health`; None without a problem."""
        if self._closing:
            return "the service is shutting down"
        started = [start for start, _ in list(self._batches.values())]
        if started and monotonic() - min(started) > 2 * self._timeout:
            return "a device is stuck"
        return self._problem

    def check_open(self) -> None:
        """Raise `RequestError`, status 503, at shutdown and when no device is left."""
        if self._closing or not self._alive:
            raise RequestError(f"{self.problem}; try again soon", 503)

    def submit(self, work: Any, key: Hashable, size: int, future: JobFuture[Any] | None = None) -> JobFuture[Any]:
        """Queue work.

        Args:
            future: future of the result, for work that may set it before its batch is done.

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

    def when_idle(self, number: int, steps: Iterator[None]) -> Future[None]:
        """Run the steps of a task on the thread of a device while no job waits.

        A job that arrives stops the pass of a step (`PassStopped`), which the task catches.

        Returns:
            Future that is set at the end of the task, or when the device is lost.
        """
        task = IdleTask(steps, Future())
        with self._arrival:
            if number in self._alive:
                self._idle_tasks[number].append(task)
                self._arrival.notify_all()
            else:
                task.end.set_result(None)
        return task.end

    def close(self) -> None:
        """Take no more work, by `check_open`. Safe in a signal handler."""
        self._closing = True

    def _drop_cancelled(self) -> None:
        self._waiting = [job for job in self._waiting if not job.future.cancelled()]

    def _serve(self, number: int, device: Device) -> None:
        """Run batches and idle tasks on the thread of a device, until the device is lost."""
        is_idle = True
        try:
            device.on_start()
            while True:
                work = self._next(number, None if is_idle else IDLE_SECONDS)
                is_idle = work is None
                if work is None:
                    device.on_idle()
                elif isinstance(work, list):
                    self._run_batch(number, device, work)
                else:
                    self._run_step(number, work)
        except BaseException:
            logger.exception("device %d is lost", number)
            self._lose(number)

    def _run_batch(self, number: int, device: Device, batch: list[Job]) -> None:
        is_complete = _run(device, batch)
        start, _ = self._batches.pop(number)
        seconds = monotonic() - start
        if is_complete:
            self._learn_speed(seconds, sum(job.size for job in batch))
        else:
            logger.info("device %d stopped a pass after %.1f s: nobody waits for it", number, seconds)

    def _run_step(self, number: int, task: IdleTask) -> None:
        with stoppable(lambda: bool(self._waiting)):
            for _ in task.steps:
                return
        self._idle_tasks[number].popleft()
        task.end.set_result(None)

    def _lose(self, number: int) -> None:
        """Fail the jobs of a lost device, and all waiting jobs if it was the last one. `/health` reports it."""
        self._problem = f"device {number} is lost"
        _, jobs = self._batches.pop(number, (0, []))
        with self._arrival:
            self._alive.discard(number)
            if not self._alive:
                jobs, self._waiting = jobs + self._waiting, []
        for task in self._idle_tasks[number]:
            task.end.set_result(None)
        for job in jobs:
            _fail(job, RequestError(f"{self._problem}; try again soon", 503))

    def _next(self, number: int, timeout: float | None) -> list[Job] | IdleTask | None:
        """Take the job that is due first, with the jobs of its batch. If no job waits, return the next idle task.

        Return None if neither arrives within `timeout` seconds.
        """
        with self._arrival:
            if not self._arrival.wait_for(lambda: self._waiting or self._idle_tasks[number], timeout):
                return None
            if not self._waiting:
                return self._idle_tasks[number][0]
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
        """Update the speed: a running mean over the last few batches."""
        if size:
            mean = self._seconds_per_size
            self._seconds_per_size += (seconds / size - mean) * (0.2 if mean else 1)


def _run(device: Device, batch: list[Job]) -> bool:
    """Run a batch. If it fails, run each of its jobs alone, so that one job cannot fail another.

    Returns:
        Whether the batch is complete; False if a pass was stopped.

    Raises:
        BaseException: the device is lost. Some jobs of the batch have no result yet.
    """
    if not batch:
        return True
    try:
        results = _run_stoppable(device, batch)
    except PassStopped:
        metrics.STOPPED.inc()
        for job in batch:
            _fail(job, PassStopped())  # a new one, because the traceback of the other refers to this batch
        return False
    except Exception as error:
        if not isinstance(error, RequestError) and not device.is_alive():
            raise
        if len(batch) > 1:
            complete = [_run(device, [job]) for job in batch]
            return all(complete)
        _fail(batch[0], error)
        return True
    for job, result in zip(batch, results, strict=True):
        with suppress(InvalidStateError):
            job.future.set_result(result)
    return True


def _run_stoppable(device: Device, batch: list[Job]) -> list[Any]:
    """Run the work of a batch. Raise `PassStopped` when all its jobs are cancelled."""
    futures = [job.future for job in batch]
    with stoppable(lambda: all(future.is_cancelled for future in futures)):
        results = device.run([job.work for job in batch])
    assert len(results) == len(batch)
    return results


def _fail(job: Job, error: Exception) -> None:
    with suppress(InvalidStateError):
        job.future.set_exception(error)


class DevicePipeline(Protocol):
    """A pipeline, from the view of devices."""

    vaes: list[VAE]
    """VAE of each device."""

    def forward(self, vae: VAE, batch: list[Any]) -> list[Any]:
        """Run the work of a batch and return its results in order."""


class DevicePool:
    """Devices of all models. Each runs one batch of one model at a time, so passes do not compete for memory."""

    def __init__(self, devices: Sequence[torch.device], timeout: float) -> None:
        """Create the queue. `timeout` is the deadline of a request in seconds; see `DeviceQueue`."""
        self.queue = DeviceQueue(
            [
                Device(partial(self._run, number), partial(self._is_alive, number), HEAP.trim, partial(_use, device))
                for number, device in enumerate(devices)
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


def _use(device: torch.device) -> None:
    """Make this GPU the thread's own, where kernels of Triton start. By default each thread has the first GPU."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def device_names(device: str | None) -> list[str]:
    """Return the names of the devices to run on: `device`, or every GPU, or the CPU.

    Raises:
        ValueError: this machine does not have the device.
    """
    map_gpu_memory()
    if device:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"VAE_DEVICE: torch cannot use {device!r} here ({reason}); name another") from None
        return [device]
    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["mps" if torch.backends.mps.is_available() else "cpu"]
