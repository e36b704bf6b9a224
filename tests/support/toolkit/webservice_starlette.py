"""A stand-in for the Inference Toolkit: it loads `handler.py` as the toolkit does, in an app with `POST /`.

Under uvicorn it is version 0.5.6. Under gunicorn it is the next one, which can unload an idle model (`idle`).
"""

import asyncio
import importlib.util
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

if "gunicorn" in sys.modules:
    import idle


def load_handler(model_dir: str) -> object:
    """Execute `handler.py` under the toolkit's module name, with its folder first on the path. Return the handler."""
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", Path(model_dir) / "handler.py")
    sys.path.insert(0, model_dir)
    module = importlib.util.module_from_spec(spec)
    sys.modules["handler.EndpointHandler"] = module
    spec.loader.exec_module(module)
    return module.EndpointHandler(model_dir)


def is_lazy() -> bool:
    return "idle" in globals() and idle.UNLOAD_IDLE


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    if is_lazy():
        app.state.checker = asyncio.create_task(idle.live_check_loop())
    else:
        app.state.inference_handler = load_handler(os.environ["HF_MODEL_DIR"])
    yield


async def health(request: Request) -> Response:
    return PlainTextResponse("Ok")


async def predict(request: Request) -> Response:
    """Call the handler. The toolkit knows no tensor content type, and returns 400 for every failure."""
    error = "the stand-in's own route answered"
    if is_lazy():
        async with idle.request_witnesses():
            try:
                app.state.inference_handler = load_handler(os.environ["HF_MODEL_DIR"])
            except Exception as failure:
                error = str(failure)
    return JSONResponse({"error": error}, status_code=400)


logging.basicConfig(level=logging.INFO, stream=sys.stdout)  # the toolkit does so
app = Starlette(
    routes=[
        Route("/", health, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/", predict, methods=["POST"]),
        Route("/predict", predict, methods=["POST"]),
    ],
    lifespan=lifespan,
)
