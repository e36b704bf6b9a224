"""A server of all small checkpoints, each app under `/<key>`: `python -m tests.support.models_server --folder F`.

`/<key>-float16` and `/<key>-bfloat16` are the same models in these dtypes. The first request to a model loads it, and
makes its checkpoint unless it exists.

After `POST /mode/<mode>` every request runs in that memory mode, or is refused by a model without it.
"""

from __future__ import annotations

import logging
import os
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from handlers.serving.http.app import build_app
from handlers.serving.pipeline import Pipeline
from handlers.serving.settings import Settings
from handlers.serving.vae import vae
from handlers.serving.vae.memory import Mode, choose_modes
from tests.support.checkpoints import SERVED, checkpoint, model_for, small_tiles

forced: Mode | None = None


def choose(*plan: object, offered: list[Mode]) -> list[Mode]:
    if forced is None:
        return choose_modes(*plan, offered=offered)
    return [mode for mode in offered if mode is forced]


async def force(request: Request) -> Response:
    global forced
    name = request.path_params["mode"]
    forced = None if name == "auto" else Mode(name)
    return PlainTextResponse("Ok")


async def health(request: Request) -> Response:
    return PlainTextResponse("Ok")


class Handler:
    def __init__(self, key: str, folder: Path, dtype: str | None) -> None:
        settings = Settings(model=key, weights=str(folder), dtype=dtype, fast=os.environ["VAE_FAST"] == "1")
        loaded = vae.VAE.load(model_for(key), "", settings, os.environ.get("VAE_DEVICE", "cpu"))
        for model in (loaded.model, loaded.probe.copy):
            small_tiles(model, loaded.layout.vae_scale_factor)
        for task, passes in loaded.fast.candidates.items():
            if passes:  # a check of small models does not find the fast pass faster each time
                loaded.fast._set(task, passes[0], "on: without a check")
        self.pipeline = Pipeline([loaded], settings)


def load(folder: Path, key: str, dtype: str | None) -> Starlette:
    app = build_app(key)
    app.state.handler = Handler(key, checkpoint(folder, key), dtype)
    return app


class LazyApp:
    """An app that loads at its first request, because few tests need every model."""

    def __init__(self, folder: Path, key: str, dtype: str | None = None) -> None:
        self.app = cache(partial(load, folder, key, dtype))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app()(scope, receive, send)


def main(folder: Annotated[Path, typer.Option()], port: int = 8000) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    vae.choose_modes = lambda *plan: choose(*plan[:-1], offered=plan[-1])
    routes = [Route("/health", health), Route("/mode/{mode}", force, methods=["POST"])]
    for key in (*SERVED, "tiny"):
        routes += [
            Mount(f"/{key}", app=LazyApp(folder, key)),
            *(Mount(f"/{key}-{dtype}", app=LazyApp(folder, key, dtype)) for dtype in ("float16", "bfloat16")),
        ]
    uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=port, access_log=False)


if __name__ == "__main__":
    typer.run(main)
