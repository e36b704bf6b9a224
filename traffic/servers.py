"""Servers that take the traffic: this project's own, or the Inference Toolkit with a deployed repository."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch

from handlers import MODELS
from scripts.local_server import ROOT, serve
from traffic.memory_limit import LimitedServer, limited_server
from traffic.messages import Address, parse_address

SMALL = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1}
LIMITS = {"VAE_MAX_BODY_MB": "4", "VAE_MAX_PIXELS": "1048576", "VAE_MAX_QUEUE": "16"}
"""Small limits, so that a request over them takes no time."""
ORIGIN = "https://a.example"
"""Origin whose pages may call a server."""
TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(?:[ |+].*\n)*+(.*)\n(?!\nDuring handling of)")
KNOWN = "h11._util."
"""Errors of uvicorn and h11 themselves, when a body was not HTTP and the service had already responded."""


@dataclass(frozen=True)
class Server:
    key: str
    """Key of the model at the root."""
    url: str
    weights: dict[str, Path]
    """Weights of each served model, by its key."""
    log: Path
    process: psutil.Process
    limited: LimitedServer | None = None
    """The same server if it runs within a memory limit."""

    @property
    def address(self) -> Address:
        return parse_address(self.url)

    @property
    def memory(self) -> int:
        """Return the resident memory in bytes."""
        return self.process.memory_info().rss

    @property
    def alive(self) -> bool:
        return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE

    def logged_errors(self) -> list[str]:
        """Return the last line of each stack trace in the log, or of each chain of them, except `KNOWN`."""
        errors = TRACEBACK.findall(self.log.read_text(errors="replace"))
        return [error for error in errors if not error.startswith(KNOWN)]


@contextmanager
def server(
    models: str, folder: Path, toolkit: Path | None = None, memory: int | None = None, **environment: str
) -> Iterator[Server]:
    """Start a server of one model, or of several as in "tiny,flux". Write its files into `folder`.

    `tiny` has its own weights. Another model has its published architecture with few channels and random weights.

    Args:
        toolkit: a checkout of the Inference Toolkit, which then serves a repository as it is deployed.
        memory: memory limit in bytes, as in a container. The server then has the service's own limits, not `LIMITS`.
        environment: variables of the server, which override `LIMITS`.
    """
    keys, all_weights = models.split(","), folder / "weights"
    weights = {key: all_weights / key if len(keys) > 1 else all_weights for key in keys}
    for key, checkpoint in weights.items():
        make_checkpoint(key, checkpoint)
    options: dict[str, Any] = {"log": folder / "server.log", "VAE_CORS_ORIGINS": ORIGIN}
    options |= environment if memory else {**LIMITS, **environment}
    start = serve if memory is None else partial(limited_server, memory)
    if toolkit is None:
        running = start("--model", models, "--weights", str(all_weights), "--device", "cpu", **options)
    else:
        path = os.pathsep.join([str(toolkit / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
        running = start(
            command=("-m", "uvicorn", "huggingface_inference_toolkit.webservice_starlette:app"),
            HF_MODEL_DIR=str(_repository(keys, all_weights, folder / "repository")),
            PYTHONPATH=path,
            PYTHONSAFEPATH="1",  # import the repository's handlers, not those here
            VAE_DEVICE="cpu",
            **options,
        )
    with running as started:
        limited = started if isinstance(started, LimitedServer) else None
        url = limited.url if limited else started
        process = limited.process if limited else listening(parse_address(url)[1])
        yield Server(keys[0], url, weights, options["log"], process, limited)


def listening(port: int) -> psutil.Process:
    """Return the child process that listens on a port."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in process.net_connections()):
                return process
    raise RuntimeError(f"nothing listens on port {port}")


def make_checkpoint(key: str, folder: Path) -> None:
    """Write a checkpoint with random weights. Its frames are pale, so H.264 loses little of them."""
    model = MODELS[key]
    if key == "tiny":
        shutil.copytree(model.checkpoint, folder)
        return
    torch.manual_seed(0)
    vae = getattr(diffusers, model.vae_class).from_config({**model.published_config, **SMALL})
    vae.save_pretrained(folder)


def _repository(keys: list[str], weights: Path, folder: Path) -> Path:
    """Copy the files that `make deploy` uploads and a server reads."""
    folder.mkdir()
    shutil.copy(ROOT / "handler.py", folder)
    shutil.copytree(ROOT / "handlers", folder / "handlers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(weights, folder / "vae")
    models = {"models": keys} if len(keys) > 1 else {"model": keys[0]}
    (folder / "endpoint.json").write_text(json.dumps(models))
    return folder
