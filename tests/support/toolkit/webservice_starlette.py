"""A stand-in for the Inference Toolkit: it loads `handler.py` as the toolkit does, in an app with `POST /`."""

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


def load_handler(model_dir: str) -> object:
    """Execute `handler.py` under the toolkit's module name, with its folder first on the path. Return the handler."""
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", Path(model_dir) / "handler.py")
    sys.path.insert(0, model_dir)
    module = importlib.util.module_from_spec(spec)
    sys.modules["handler.EndpointHandler"] = module
    spec.loader.exec_module(module)
    return module.EndpointHandler(model_dir)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    app.state.inference_handler = load_handler(os.environ["HF_MODEL_DIR"])
    yield


async def health(request: Request) -> Response:
    return PlainTextResponse("Ok")


async def predict(request: Request) -> Response:
    """Call the handler. The toolkit knows no tensor content type, and returns 400 for every failure."""
    return JSONResponse({"error": "the stand-in's own route answered"}, status_code=400)


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
