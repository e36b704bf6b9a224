"""Tensors to an endpoint and back: C-contiguous little-endian bytes, with shape and dtype beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx2 as httpx
import torch
from torch import Tensor

from remote_vae.client import Client, RemoteVAEError


def decode(client: Client, latents: Tensor, **parameters: Any) -> Tensor:
    """Latents to pixels; `parameters` are those of docs/http-api.md, and `output_type` is "pt" without one."""
    return from_answer(post_tensor(client, "/decode", latents, {"output_type": "pt", **parameters}))


def decode_mp4(client: Client, latents: Tensor, **parameters: Any) -> bytes:
    """Latents of one video to an MP4 file."""
    return post_tensor(client, "/decode", latents, {**parameters, "output_type": "mp4"}, "video/mp4").content


def stream_mp4(client: Client, latents: Tensor, **parameters: Any) -> Iterator[bytes]:
    """The same while the endpoint decodes it: a fragmented MP4, in pieces that play as they come.

    Raises:
        RemoteVAEError: as all requests; or the file has no end, whatever the connection said.
    """
    end = b""
    given = {**parameters, "output_type": "mp4", "stream": True}
    for piece in client.stream("/decode", **tensor_request(latents, given, "video/mp4")):
        end = (end + piece)[-16:]
        yield piece
    if end[4:8] != b"mfro":  # the last box of a fragmented MP4
        raise RemoteVAEError(f"the video from {client.url} broke off before its end")


def encode(client: Client, pixels: Tensor, **parameters: Any) -> Tensor:
    """Pixels in [-1, 1], or uint8, to latents; `parameters` are those of docs/http-api.md."""
    return from_answer(post_tensor(client, "/encode", pixels, parameters))


def post_tensor(
    client: Client, path: str, tensor: Tensor, parameters: Mapping[str, Any], accept: str = "tensor/binary"
) -> httpx.Response:
    """The answer to a tensor and these parameters; those that are None are not sent."""
    return client.request("POST", path, **tensor_request(tensor, parameters, accept))


def tensor_request(tensor: Tensor, parameters: Mapping[str, Any], accept: str) -> dict[str, Any]:
    """httpx's arguments for it."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {
        "params": {"shape": list(tensor.shape), "dtype": dtype, **as_query(parameters)},
        "content": to_bytes(tensor),
        "headers": {"Content-Type": "tensor/binary", "Accept": accept},
    }


def as_query(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as they stand in a URL, without those that are None."""
    given = {name: value for name, value in parameters.items() if value is not None}
    return {name: str(value).lower() if isinstance(value, bool) else value for name, value in given.items()}


def memory_format(tensor: Tensor) -> str | None:
    """As the endpoint calls it: torch's kernels round otherwise for another one."""
    last = torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d
    return None if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last) else "channels_last"


def to_bytes(tensor: Tensor) -> bytes:
    """numpy, which has no bfloat16, sees bytes only."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def from_answer(answer: httpx.Response) -> Tensor:
    """The tensor in an answer's body, on the CPU."""
    shape, dtype = json.loads(answer.headers["shape"]), getattr(torch, answer.headers["dtype"])
    return torch.frombuffer(bytearray(answer.content), dtype=dtype).reshape(shape)
