"""The Inference Toolkit around the app: its routes, idle checker and workers.

Every name of the toolkit that the project uses is in this file. Version 0.5.6 has no `idle`, and no gunicorn.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from anyio import to_thread
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from handlers.serving.errors import RequestError

logger = logging.getLogger(__name__)

MODULES = ("webservice_starlette", "huggingface_inference_toolkit.webservice_starlette")
"""Names of the module with the toolkit's app: in its container, and in a checkout."""

_tasks: set[asyncio.Task[None]] = set()
"""Running tasks. The event loop keeps only weak references to them."""


def find_toolkit() -> Any:
    """Return the toolkit's module, or None under another server."""
    return next((sys.modules[name] for name in MODULES if name in sys.modules), None)


def mount(app: ASGIApp) -> None:
    """Put the app in front of the toolkit's own routes, which cannot carry raw tensors."""
    toolkit = find_toolkit()
    if toolkit is None:
        return
    if hasattr(toolkit, "idle"):
        app = ActivityReport(app, toolkit.idle.request_witnesses)
    toolkit.app.router.routes.insert(0, Mount("/", app=app))
    toolkit.app.router.default = app  # for paths that do not begin with a slash


class ActivityReport:
    """ASGI middleware that reports requests with a body to the toolkit's idle checker, until their last byte is sent.

    The checker ends a worker that had no request for `IDLE_TIMEOUT` seconds. It sees only the toolkit's own routes.
    """

    def __init__(self, app: ASGIApp, report: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        self.app, self.report = app, report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            return await self.app(scope, receive, send)
        async with self.report():
            await self.app(scope, receive, send)


def check_workers() -> None:
    """Raise `ValueError` if the toolkit's gunicorn starts several workers, each with all models on all devices."""
    workers = os.environ.get("WORKERS") or "1"
    if "gunicorn" in sys.modules and workers != "1":
        raise ValueError(
            f"WORKERS={workers}: each worker would load the model again, on the same device; unset WORKERS. "
            "One worker uses every GPU and takes many requests at once"
        )


def is_lazy() -> bool:
    """Return whether the toolkit creates the handler in its first request (`UNLOAD_IDLE`), and not at its start."""
    toolkit = find_toolkit()
    return hasattr(toolkit, "idle") and toolkit.idle.UNLOAD_IDLE


def load_in_background(load: Callable[[], None]) -> None:
    """Run `load` on a thread, so that the event loop is not blocked: gunicorn kills a worker after 30 s of that.

    The worker counts as busy meanwhile. If `load` fails, the worker ends, and the next one tries again.

    Raises:
        RequestError: always. The toolkit responds to its first request by itself and cannot read tensors, so that
            request is refused.
    """
    report = find_toolkit().idle.request_witnesses

    async def run() -> None:
        try:
            async with report():
                await to_thread.run_sync(load, abandon_on_cancel=True)
        except Exception:
            logger.exception("the model was not loaded; this worker ends")
            os.kill(os.getpid(), signal.SIGTERM)

    task = asyncio.get_running_loop().create_task(run())
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    # the toolkit makes it a 400
    raise RequestError(
        "the model is loading: UNLOAD_IDLE loads it at the first request, which gets no result; send it again", 503
    )
