"""Requests as the objects of JSON messages."""

import base64
import io
from typing import Any

import torch
from PIL import Image

from handlers.serving.media.output import describe, tensor_bytes
from handlers.serving.media.payload import read_tensor
from handlers.serving.pipeline import Pipeline


def make_message(value: torch.Tensor | Image.Image, **parameters: Any) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        shape, dtype = describe(value)
        parameters |= {"shape": shape, "dtype": dtype}
        content = tensor_bytes(value)
    else:
        file = io.BytesIO()
        value.save(file, "PNG")
        content = file.getvalue()
    return {"inputs": base64.b64encode(content).decode(), "parameters": parameters}


def send(pipeline: Pipeline, value: torch.Tensor | Image.Image, **parameters: Any) -> Any:
    """Run a request. Return its tensor, or the bytes of its file."""
    response = pipeline.run_message(make_message(value, **parameters))
    if isinstance(response, str):
        return base64.b64decode(response)
    return read_tensor(base64.b64decode(response["inputs"]), **response["parameters"])
