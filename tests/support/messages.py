"""Requests as the objects of JSON messages."""

import base64
from typing import Any

import torch

from handlers.serving.media.output import describe, tensor_bytes
from handlers.serving.media.payload import read_tensor
from handlers.serving.pipeline import Pipeline


def message_of(tensor: torch.Tensor, **parameters: Any) -> dict[str, Any]:
    shape, dtype = describe(tensor)
    inputs = base64.b64encode(tensor_bytes(tensor)).decode()
    return {"inputs": inputs, "parameters": {"shape": shape, "dtype": dtype, **parameters}}


def send(pipeline: Pipeline, tensor: torch.Tensor, **parameters: Any) -> Any:
    """Run a request. Return its tensor, or the bytes of its file."""
    response = pipeline.run_message(message_of(tensor, **parameters))
    if isinstance(response, str):
        return base64.b64decode(response)
    return read_tensor(base64.b64decode(response["inputs"]), **response["parameters"])
