"""What all models of a process share: the threads of its devices, and places for requests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from handlers.serving.limits import Limits
from handlers.serving.vae.heap import HEAP
from handlers.serving.vae.vae import VAE
from handlers.serving.worker import Device, DeviceWorkers, JobFuture

BATCH_PIXELS = 1024 * 1024
"""Pixels of pictures that go through a GPU as one batch: four of 512x512, which alone leave a large GPU idle in part.

A CPU is busy with one, so it takes them one by one.
"""


class Runner(Protocol):
    """A pipeline, as far as devices are concerned."""

    vaes: list[VAE]
    """One for each device."""

    def forward(self, vae: VAE, batch: list[Any]) -> list[Any]:
        """Runs the work of a batch and gives its results in order."""


class Machine:
    """Each device runs one batch at a time, whichever model it is of, so their passes never compete for memory."""

    def __init__(self, devices: Sequence[torch.device], limits: Limits) -> None:
        runners = [
            Device(partial(self._run, number), partial(self._is_alive, number), HEAP.trim)
            for number in range(len(devices))
        ]
        self.workers = DeviceWorkers(runners, 0 if devices[0].type == "cpu" else BATCH_PIXELS, limits.timeout)
        self.readers = asyncio.Semaphore(os.cpu_count() or 1)
        """Held while a payload is parsed: a picture takes several times its pixels then."""
        self.places = asyncio.Semaphore(limits.max_queue + len(devices))
        """Held by a request from its payload to its answer; `exchange` takes them, first come, first served."""
        self._running: dict[int, Runner] = {}

    def submit(self, pipeline: Runner, work: Any, key: Hashable, size: int, future: JobFuture[Any]) -> JobFuture[Any]:
        """Queues work for `pipeline.forward`; jobs of one pipeline and key may be one batch."""
        return self.workers.submit((pipeline, work), (id(pipeline), key), size, future)

    def _run(self, number: int, batch: list[tuple[Runner, Any]]) -> list[Any]:
        pipeline = self._running[number] = batch[0][0]
        return pipeline.forward(pipeline.vaes[number], [work for _, work in batch])

    def _is_alive(self, number: int) -> bool:
        return self._running[number].vaes[number].is_alive()
