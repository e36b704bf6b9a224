"""Tensors to an endpoint and back: C-contiguous little-endian bytes, with shape and dtype beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from remote_vae.client import Client, RemoteVAEError, Response
from remote_vae.text import read_shape

DTYPES = {name: getattr(torch, name) for name in ("float16", "float32", "bfloat16", "uint8")}

DECODED = 1024
"""Bytes of pixels that a value of latents becomes at most. Of LTX-2, whose values become the most, they are 768:
3 channels of 4 bytes for 32x32 pixels of 8 frames, of 128 latent channels."""

ENCODED = 8
"""Bytes of latents for each value of pixels at most: there are never more means, or log-variances, than pixels."""


def decode(client: Client, latents: Tensor, **parameters: Any) -> Tensor:
    """Latents to pixels; `parameters` are those of docs/http-api.md, and `output_type` is "pt" without one."""
    return to_tensor(post_tensor(client, "/decode", latents, {"output_type": "pt", **parameters}))


def decode_mp4(client: Client, latents: Tensor, **parameters: Any) -> bytes:
    """Latents of one video to an MP4 file."""
    parameters = {**parameters, "output_type": "mp4"}
    return b"".join(_mp4(client, [post_tensor(client, "/decode", latents, parameters, "video/mp4").content]))


def stream_mp4(client: Client, latents: Tensor, **parameters: Any) -> Iterator[bytes]:
    """The same while the endpoint decodes it: a fragmented MP4, in pieces that play as they come.

    Raises:
        RemoteVAEError: as all requests; or it is no MP4, or the file has no end, whatever the connection said.
    """
    end = b""
    given = {**parameters, "output_type": "mp4", "stream": True}
    request = tensor_request(latents, given, "video/mp4")
    for piece in _mp4(client, client.stream("/decode", max_bytes=most_bytes("/decode", latents), **request)):
        end = (end + piece)[-16:]
        yield piece
    if end[4:8] != b"mfro":  # the last box of a fragmented MP4
        raise RemoteVAEError(f"the video from {client.url} broke off before its end")


def _mp4(client: Client, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces of a file once they have begun as an MP4 does."""
    rest, start = iter(pieces), b""
    while len(start) < 8 and (piece := next(rest, b"")):
        start += piece
    if start[4:8] != b"ftyp":
        message = f"{client.url}/decode: the response is no MP4, and begins with {start[:40]!r}"
        raise RemoteVAEError(f"{message}; is this a service of this project?")
    yield start
    yield from rest


def encode(client: Client, pixels: Tensor, **parameters: Any) -> Tensor:
    """Pixels in [-1, 1], or uint8, to latents; `parameters` are those of docs/http-api.md."""
    return to_tensor(post_tensor(client, "/encode", pixels, parameters))


def post_tensor(
    client: Client, path: str, tensor: Tensor, parameters: Mapping[str, Any], accept: str = "tensor/binary"
) -> Response:
    """The response to a tensor and these parameters; those that are None are not sent."""
    request = tensor_request(tensor, parameters, accept)
    return client.request("POST", path, max_bytes=most_bytes(path, tensor), **request)


def most_bytes(path: str, tensor: Tensor) -> int:
    """The most bytes of any form that this tensor may be encoded or decoded to, and some for what is around them."""
    each = DECODED if path == "/decode" else ENCODED
    return tensor.numel() * each + (1 << 20)


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


def to_tensor(response: Response) -> Tensor:
    """The tensor in a response's body, on the CPU.

    Raises:
        RemoteVAEError: it is none.
    """
    headers, content = response.headers, response.content
    try:
        shape, dtype = read_shape(headers.get("shape", "")), headers.get("dtype", "")
        if dtype not in DTYPES:
            raise ValueError(f"its `dtype` {dtype[:40]!r} is not one of {', '.join(DTYPES)}")
        size = math.prod(shape) * DTYPES[dtype].itemsize
        if size != len(content):
            raise ValueError(f"its `shape` {shape} is one of {size} bytes, and {len(content)} came")
    except ValueError as error:
        kind = headers.get("content-type", "none")[:60]
        message = f"the response ({kind}) is no tensor: {error}; is this a service of this project?"
        raise RemoteVAEError(message) from None
    return torch.frombuffer(bytearray(content), dtype=DTYPES[dtype]).reshape(shape)
