"""A server of all small checkpoints, each model under its key, and the models themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import requests
import torch
from torch import Tensor

from handlers.serving.media.output import describe, tensor_bytes
from handlers.serving.vae.weights import find_class
from scripts.local_server import serve
from tests.support.checkpoints import SERVED, SMALL, checkpoint, model_for, small_tiles

__all__ = ["SERVED", "Service", "as_tensor", "running_service"]


class Service:
    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.model = cache(self._load)

    def _load(self, key: str) -> Any:
        model = (
            find_class(SMALL[key][0] if key in SMALL else "AutoencoderKL")
            .from_pretrained(checkpoint(self.folder, key))
            .eval()
            .requires_grad_(False)
        )
        if (declared := model_for(key)) and declared.always_tiles:  # as in `models_server`
            small_tiles(model, declared.vae_scale_factor)
        return model

    def post(
        self, key: str, tensor: Tensor, task: str, headers: dict[str, str] | None = None, **parameters: Any
    ) -> requests.Response:
        shape, dtype = describe(tensor)
        return requests.post(
            f"{self.url}/{key}/{task}",
            data=tensor_bytes(tensor),
            params={"shape": shape, "dtype": dtype, **parameters},
            headers={"Content-Type": "tensor/binary", **(headers or {})},
            timeout=60,
        )

    def tensor(self, key: str, tensor: Tensor, task: str, **parameters: Any) -> Tensor:
        return as_tensor(self.post(key, tensor, task, **parameters))

    def refusal(self, key: str, tensor: Tensor, task: str, **parameters: Any) -> str:
        response = self.post(key, tensor, task, **parameters)
        assert response.status_code in (400, 422), response.headers
        return response.json()["error"]


def as_tensor(response: requests.Response) -> Tensor:
    assert response.ok, response.text
    dtype = getattr(torch, response.headers["dtype"])
    return torch.frombuffer(bytearray(response.content), dtype=dtype).reshape(json.loads(response.headers["shape"]))


@contextmanager
def running_service(folder: Path, log: Path, **environment: str) -> Iterator[Service]:
    """Serve the small checkpoints. Each is made in this folder at its first use."""
    folder.mkdir(exist_ok=True)
    with serve("--folder", str(folder), log=log, command=("-m", "tests.support.models_server"), **environment) as url:
        yield Service(url, folder)
