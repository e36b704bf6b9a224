"""Serve VAEs on this machine: `make serve MODEL=tiny`."""

import logging
import os
import socket
from ipaddress import ip_address
from typing import Annotated

import typer
from safetensors import SafetensorError

from handlers import fitting_models
from scripts.connections import run_server

logger = logging.getLogger(__name__)


def main(
    model: Annotated[
        str | None,
        typer.Option(envvar="MODEL", help="Key of the model, or several as a,b,c; `make models` lists them."),
    ] = None,
    host: Annotated[
        str, typer.Option(envvar="HOST", help="Address to listen on; 0.0.0.0 listens on every interface.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="PORT", help="Port to listen on.")] = 8000,
    weights: Annotated[
        str | None,
        typer.Option(envvar="WEIGHTS", help='Folder, .safetensors file, org/repo[:subfolder][@revision], or "random".'),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(envvar="DEVICE", help="cpu, cuda, cuda:1 or mps; default: the best one of this machine."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(envvar="DTYPE", help="float32, float16 or bfloat16; default: the model's own.")
    ] = None,
) -> None:
    """Serve VAEs over HTTP until SIGTERM or Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    options = {"model": model, "weights": weights, "device": device, "dtype": dtype}
    os.environ.update({f"VAE_{name.upper()}": value for name, value in options.items() if value})
    try:
        from handler import EndpointHandler, app, settings
        from handlers.serving.settings import REPOSITORY

        EndpointHandler(str(REPOSITORY))
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise SystemExit(f"error: {error}{fitting_models(error)}") from None
    if is_loopback(host):
        app.state.loopback_host = host
    elif not settings.api_token:
        logger.warning(
            "anybody who reaches %s:%d may call this service; API_TOKEN=... makes it ask for a token", host, port
        )
    run_server(app, host, port, stop_after=int(settings.grace) + 5)  # by then every request has its response


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server that listens on `host`."""
    try:
        addresses = {address[4][0] for address in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ip_address(str(address)).is_loopback for address in addresses)


if __name__ == "__main__":
    typer.run(main)
