"""Serves one VAE on this machine: `make serve MODEL=tiny`."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from safetensors import SafetensorError

REPOSITORY = Path(__file__).parent.parent


def main(
    model: Annotated[str | None, typer.Option(help="Key of the model; `make models` lists them.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    weights: Annotated[str | None, typer.Option(help='Folder with the weights, or "random".')] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the best that is there.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: the model's own.")] = None,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    options = {"model": model, "weights": weights, "device": device, "dtype": dtype}
    os.environ.update({f"VAE_{name.upper()}": value for name, value in options.items() if value})
    try:
        from handler import EndpointHandler, app, settings

        EndpointHandler(str(REPOSITORY))
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise SystemExit(f"error: {error}") from None
    stop_after = int(settings.grace) + 5  # by then every request has its answer
    uvicorn.run(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=stop_after)


if __name__ == "__main__":
    typer.run(main)
