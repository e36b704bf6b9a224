"""Requests and responses with tensors: C-contiguous little-endian bytes, with shape and dtype beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from remote_vae.client import RemoteVAEError, Response
from remote_vae.pool import AnyClient
from remote_vae.text import read_shape

DTYPES = {name: getattr(torch, name) for name in ("float16", "float32", "bfloat16", "uint8")}

DECODED_BYTES = 1024
"""Most bytes of pixels for each value of latents. LTX-2 has the most, 768: 3 channels of 4 bytes for 32x32 pixels of
8 frames, from 128 latent channels."""

ENCODED_BYTES = 8
"""Most bytes of latents for each value of pixels. No VAE has more means, or more log-variances, than pixels."""


def decode(client: AnyClient, latents: Tensor, **parameters: Any) -> Tensor:
    """Decode latents to pixels. The parameters are those of docs/http-api.md; `output_type` is "pt" by default."""
    return to_tensor(post_tensor(client, "/decode", latents, {"output_type": "pt", **parameters}))


def decode_mp4(client: AnyClient, latents: Tensor, **parameters: Any) -> bytes:
    """Decode the latents of one video to an MP4 file."""
    parameters = {**parameters, "output_type": "mp4"}
    return b"".join(_check_mp4(client, [post_tensor(client, "/decode", latents, parameters, "video/mp4").content]))


def stream_mp4(client: AnyClient, latents: Tensor, **parameters: Any) -> Iterator[bytes]:
    """Decode the latents of one video, and yield a fragmented MP4 file as the endpoint writes it.

    Raises:
        RemoteVAEError: the request failed, the response is no MP4, or the file is incomplete.
    """
    end = b""
    request = tensor_request(latents, {**parameters, "output_type": "mp4", "stream": True}, "video/mp4")
    for chunk in _check_mp4(client, client.stream("/decode", max_bytes=max_bytes("/decode", latents), **request)):
        end = (end + chunk)[-16:]
        yield chunk
    if end[4:8] != b"mfro":  # the last box of a fragmented MP4
        raise RemoteVAEError(f"the video from {client.url} ended early: expected the box `mfro` at its end; try again")


def _check_mp4(client: AnyClient, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the chunks of a file after its start is known to be that of an MP4."""
    chunks, start = iter(chunks), b""
    while len(start) < 8 and (chunk := next(chunks, b"")):
        start += chunk
    if start[4:8] != b"ftyp":
        message = f"{client.url}/decode: the response is no MP4, and begins with {start[:40]!r}"
        raise RemoteVAEError(f"{message}; is this a service of this project?")
    yield start
    yield from chunks


def encode(client: AnyClient, pixels: Tensor, **parameters: Any) -> Tensor:
    """Encode pixels, in [-1, 1] or uint8, to latents. The parameters are those of docs/http-api.md."""
    return to_tensor(post_tensor(client, "/encode", pixels, parameters))


def encode_jpeg(client: AnyClient, file: bytes, size: tuple[int, int], **parameters: Any) -> Tensor:
    """Encode a JPEG file of this width and height to latents. The endpoint decodes it."""
    response = client.request(
        "POST",
        "/encode",
        max_bytes=size[0] * size[1] * 3 * ENCODED_BYTES + (1 << 20),
        params=as_query(parameters),
        content=file,
        headers={"Content-Type": "image/jpeg", "Accept": "tensor/binary"},
    )
    return to_tensor(response)


def post_tensor(
    client: AnyClient, path: str, tensor: Tensor, parameters: Mapping[str, Any], accept: str = "tensor/binary"
) -> Response:
    """Send a tensor. Parameters that are None are not sent."""
    request = tensor_request(tensor, parameters, accept)
    return client.request("POST", path, max_bytes=max_bytes(path, tensor), **request)


def max_bytes(path: str, tensor: Tensor) -> int:
    """Return the size of the largest response, of any type, that this tensor may be decoded or encoded to."""
    return tensor.numel() * (DECODED_BYTES if path == "/decode" else ENCODED_BYTES) + (1 << 20)


def tensor_request(tensor: Tensor, parameters: Mapping[str, Any], accept: str) -> dict[str, Any]:
    """Return httpx's arguments for a request with a tensor."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {
        "params": {"shape": list(tensor.shape), "dtype": dtype, **as_query(parameters)},
        "content": to_bytes(tensor),
        "headers": {"Content-Type": "tensor/binary", "Accept": accept},
    }


def as_query(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that are not None as a URL has them."""
    return {
        name: str(value).lower() if isinstance(value, bool) else value
        for name, value in parameters.items()
        if value is not None
    }


def memory_format(tensor: Tensor) -> str | None:
    """Return the endpoint's name of the memory format: torch's kernels round differently for each."""
    channels_last = torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d
    is_default = tensor.is_contiguous() or not tensor.is_contiguous(memory_format=channels_last)
    return None if is_default else "channels_last"


def to_bytes(tensor: Tensor) -> bytes:
    """Return the tensor's bytes. numpy has no bfloat16, so it gets the tensor as uint8."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def to_tensor(response: Response) -> Tensor:
    """Return the tensor in a response's body, on the CPU.

    Raises:
        RemoteVAEError: the response is no tensor.
    """
    headers, content = response.headers, response.content
    try:
        shape, dtype = read_shape(headers.get("shape", "")), headers.get("dtype", "")
        if dtype not in DTYPES:
            raise ValueError(f"its `dtype` {dtype[:40]!r} is not one of {', '.join(DTYPES)}")
        size = math.prod(shape) * DTYPES[dtype].itemsize
        if size != len(content):
            raise ValueError(f"it has {len(content)} bytes where its `shape` {shape} needs {size}")
    except ValueError as error:
        kind = headers.get("content-type", "none")[:60]
        message = f"the response ({kind}) is not a tensor: {error}; is this a service of this project?"
        raise RemoteVAEError(message) from None
    return torch.frombuffer(bytearray(content), dtype=DTYPES[dtype]).reshape(shape)
