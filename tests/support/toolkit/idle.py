"""Idle unloading of the stand-in: the names of the toolkit's module `idle` that the project uses, and its checker."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

UNLOAD_IDLE = os.environ.get("UNLOAD_IDLE") == "1"
IDLE_TIMEOUT = float(os.environ.get("IDLE_TIMEOUT", "15"))

running = 0
ended = 0.0
"""Time when the last request ended; 0 before the first one."""


@asynccontextmanager
async def request_witnesses() -> AsyncIterator[None]:
    global running, ended
    running += 1
    try:
        yield
    finally:
        running, ended = running - 1, time.monotonic()


async def live_check_loop() -> None:
    """End this worker after its first request, when it had none for `IDLE_TIMEOUT` seconds."""
    while running or not ended or time.monotonic() - ended < IDLE_TIMEOUT:
        await asyncio.sleep(IDLE_TIMEOUT / 5)
    logging.info("the idle checker ends this worker")
    os.kill(os.getpid(), signal.SIGTERM)
