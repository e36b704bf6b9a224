"""A plain single-threaded handler, as the pilot was: each request is parsed, decoded and written as a PNG in a row, on
the event loop. The benchmark compares the service with it."""

from __future__ import annotations

import io

import diffusers
import torch
import typer
import uvicorn
from diffusers.image_processor import VaeImageProcessor
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from handlers import get_model


def main(port: int = 8000, model: str = "sd-v1", device: str = "cpu") -> None:
    handler = get_model(model)
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else getattr(torch, handler.dtype)
    vae = getattr(diffusers, handler.vae_class).from_config(handler.published_config).eval().to(device, dtype)
    processor = VaeImageProcessor()

    async def decode(request: Request) -> Response:
        shape = [int(size) for size in request.query_params.getlist("shape")]
        latents = torch.frombuffer(bytearray(await request.body()), dtype=torch.float32).reshape(shape)
        with torch.inference_mode():
            decoded = vae.decode(latents.to(device, dtype), return_dict=False)[0]
        image = processor.postprocess(decoded, output_type="pil")[0]
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    async def health(request: Request) -> Response:
        return PlainTextResponse("Ok")

    app = Starlette(routes=[Route("/", decode, methods=["POST"]), Route("/health", health)])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
