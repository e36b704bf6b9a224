"""Latents and pictures between files and an endpoint."""

from __future__ import annotations

import io
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from remote_vae.client import Client, RemoteVAEError
from remote_vae.tensors import as_query, decode_mp4, most_bytes, post_tensor, stream_mp4, to_tensor

STDOUT = Path("-")
MOST_LATENTS = 1 << 29
"""Bytes of the latents of files; those of 257 frames of 1280x720 are 60 MB, in float32."""
IMAGES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}


def decode(client: Client, file: Path, out: Path, parameters: dict[str, Any], stream: bool = False) -> list[Path]:
    """Writes the picture, each of a batch, or the MP4 that an endpoint makes of a file's latents.

    With `stream` the MP4 is written as it comes; to standard output where `out` is "-".
    """
    suffix = out.suffix.lower()
    if (stream and suffix != ".mp4" and out != STDOUT) or (out == STDOUT and not stream):
        raise ValueError(f"{out}: an .mp4 is streamed, or to - (standard output) with --stream")
    latents = read_tensor(file)
    if stream:
        return write_pieces(out, stream_mp4(client, latents, **parameters))
    if suffix == ".mp4":
        return [write(out, decode_mp4(client, latents, **parameters))]
    if suffix not in IMAGES:
        raise ValueError(f"{out}: a picture is {', '.join(IMAGES)}, a video .mp4")
    form = {"output_type": "pil", "image_format": IMAGES[suffix]}
    response = post_tensor(client, "/decode", latents, {**parameters, **form}, "application/zip")
    pictures = read_images(client, response.content, latents, IMAGES[suffix])
    if len(pictures) == 1:
        return [write(out, pictures[0])]
    return [write(out.with_stem(f"{out.stem}-{index}"), picture) for index, picture in enumerate(pictures)]


def encode(client: Client, pictures: list[Path], out: Path, parameters: dict[str, Any]) -> list[int]:
    """Writes the latents of pictures of one size, or of a video, and gives their shape."""
    if out.suffix.lower() not in (".safetensors", ".npy"):
        raise ValueError(f"{out}: latents are written as .safetensors or .npy")
    response = client.request(
        "POST",
        "/encode",
        max_bytes=MOST_LATENTS,
        params=as_query(parameters),
        files=[("file", (picture.name, picture.read_bytes())) for picture in pictures],
    )
    latents = to_tensor(response)
    write_tensor(out, latents)
    return list(latents.shape)


def read_images(client: Client, content: bytes, latents: Tensor, image_format: str) -> list[bytes]:
    """The image files in the ZIP that these latents were decoded to.

    Raises:
        RemoteVAEError: it is no ZIP of as many images as were asked for, or they are larger than any could be.
    """
    batch = len(latents) if latents.ndim > 3 or len(latents) == 1 else None  # else it may be one that is unbatched
    name = {"jpg": "JPEG"}.get(image_format, image_format.upper())
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if not entries or len(entries) > len(latents) or (batch and len(entries) != batch):
                raise ValueError(f"it has {len(entries)} entries for a batch of {batch or 1}")
            if sum(entry.file_size for entry in entries) > most_bytes("/decode", latents):
                raise ValueError("its entries are larger than any decoded image")
            images = [archive.read(entry) for entry in entries]
        for image in images:
            if Image.open(io.BytesIO(image), formats=[name]).format != name:
                raise ValueError(f"it holds no {name}")
    except (ValueError, OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        message = f"{client.url}/decode: the response is no ZIP of the decoded images ({error})"
        raise RemoteVAEError(f"{message}; is this a service of this project?") from None
    return images


def read_tensor(file: Path) -> Tensor:
    """The one tensor in a file.

    Raises:
        ValueError: it holds none, or several, or is of no known kind.
    """
    suffix = file.suffix.lower()
    try:
        if suffix == ".npy":
            found: Any = torch.from_numpy(np.load(file, allow_pickle=False))
        elif suffix == ".safetensors":
            found = load_file(file)
        elif suffix in (".pt", ".pth"):
            found = torch.load(file, map_location="cpu", weights_only=True)
        else:
            raise ValueError(f"{file}: latents are read from .safetensors, .npy and .pt")
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError, TypeError) as error:
        raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    tensors = list(found.values()) if isinstance(found, dict) else [found]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        names = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{file} must hold one tensor, and holds {names or 'none'}")
    return tensors[0]


def write_tensor(file: Path, tensor: Tensor) -> None:
    """numpy has no bfloat16, so that goes into an .npy as float32."""
    if file.suffix.lower() == ".npy":
        array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        buffer = io.BytesIO()
        np.save(buffer, array)
        write(file, buffer.getvalue())
    else:
        part = file.with_name(f".{file.name}.part")
        save_file({"latents": tensor.contiguous()}, part)
        part.replace(file)


def write_pieces(file: Path, pieces: Iterator[bytes]) -> list[Path]:
    """As they come; to a file whose name is there once all have come, or to standard output."""
    if file == STDOUT:
        for piece in pieces:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        return []
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb", buffering=0) as output:
            for piece in pieces:
                output.write(piece)
        return [part.replace(file)]
    finally:
        part.unlink(missing_ok=True)


def write(file: Path, data: bytes) -> Path:
    """Write a file at once: nobody sees half of it under this name."""
    part = file.with_name(f".{zlib.crc32(os.fsencode(file.name)):08x}.part")  # shorter than any limit of names
    part.write_bytes(data)
    part.replace(file)
    return file
