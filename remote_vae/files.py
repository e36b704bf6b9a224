"""Latents and images between files and an endpoint."""

from __future__ import annotations

import io
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from remote_vae import tensors
from remote_vae.client import RemoteVAEError
from remote_vae.pool import AnyClient

STDOUT = Path("-")
MAX_LATENTS_BYTES = 1 << 29
"""Largest response to the encoding of files. The latents of 257 frames of 1280x720 have 60 MB in float32."""
IMAGES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Pillow's name of each kind of image file that an endpoint writes."""
READERS: dict[str, Callable[[Path], Any]] = {
    ".npy": lambda file: torch.from_numpy(np.load(file, allow_pickle=False)),
    ".pt": lambda file: torch.load(file, map_location="cpu", weights_only=True),
    ".pth": lambda file: torch.load(file, map_location="cpu", weights_only=True),
    ".safetensors": safetensors.torch.load_file,
    ".latent": lambda file: _comfyui_tensor(safetensors.torch.load_file(file)),
}


def decode(client: AnyClient, file: Path, out: Path, parameters: dict[str, Any], stream: bool = False) -> list[Path]:
    """Decode a file's latents to an image, to one image for each of a batch, or to an MP4. Return the new files.

    With `stream`, the MP4 is written while it is decoded, to standard output if `out` is "-".

    Raises:
        ValueError: a file has another type than these, or `file` does not hold one tensor, or holds latents of ComfyUI
            in another range than `do_scaling` says.
        RemoteVAEError: the endpoint refused the latents, or its response is invalid.
    """
    suffix = out.suffix.lower()
    if file.suffix.lower() == ".latent":
        parameters = parameters | _comfyui_range(client, file, is_raw=not parameters.get("do_scaling"))
    if stream:
        if suffix != ".mp4" and out != STDOUT:
            raise ValueError(f"{out} cannot be streamed: expected a name with .mp4, or - for standard output")
        return _write_chunks(out, tensors.stream_mp4(client, read_tensor(file), **parameters))
    if suffix == ".mp4":
        return [write(out, tensors.decode_mp4(client, read_tensor(file), **parameters))]
    if suffix not in IMAGES:
        raise ValueError(f"{out} is no image or video: expected {', '.join(IMAGES)}, .mp4, or - with --stream")
    images = _decode_images(client, read_tensor(file), suffix, parameters)
    if len(images) == 1:
        return [write(out, images[0])]
    return [write(out.with_stem(f"{out.stem}-{index}"), image) for index, image in enumerate(images)]


def encode(client: AnyClient, files: list[Path], out: Path, parameters: dict[str, Any]) -> list[int]:
    """Encode images of one size, or a video, to a file of latents. Return the shape of the latents."""
    if out.suffix.lower() not in (".safetensors", ".npy"):
        raise ValueError(f"{out} is no file for latents: expected a name with .safetensors or .npy")
    response = client.request(
        "POST",
        "/encode",
        max_bytes=MAX_LATENTS_BYTES,
        params=tensors.as_query(parameters),
        files=[("file", (file.name, file.read_bytes())) for file in files],
    )
    latents = tensors.to_tensor(response)
    if out.suffix.lower() == ".npy":
        write(out, npy_bytes(latents))
    else:
        write(out, safetensors.torch.save({"latents": latents}))
    return list(latents.shape)


def _decode_images(client: AnyClient, latents: Tensor, suffix: str, parameters: dict[str, Any]) -> list[bytes]:
    """Decode latents to image files.

    Raises:
        RemoteVAEError: the response is no ZIP of as many images as latents, or they are larger than any could be.
    """
    image_format = suffix[1:].replace("jpeg", "jpg")
    parameters = {**parameters, "output_type": "pil", "image_format": image_format}
    response = tensors.post_tensor(client, "/decode", latents, parameters, "application/zip")
    counts = {len(latents)} if latents.ndim > 3 else {1, len(latents)}  # three dimensions: unbatched, or packed
    if layers := parameters.get("layers"):
        counts = {layers, layers * len(latents)}
    try:
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            entries = archive.infolist()
            if len(entries) not in counts:
                raise ValueError(f"it has {len(entries)} entries for a batch of {len(latents)}")
            if sum(entry.file_size for entry in entries) > tensors.max_bytes("/decode", latents):
                raise ValueError("its entries are larger than any decoded image")
            images = [archive.read(entry) for entry in entries]
        for image in images:
            Image.open(io.BytesIO(image), formats=[IMAGES[suffix]]).close()
    except (ValueError, OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        message = f"{client.url}/decode: the response is no ZIP of the decoded images ({error})"
        raise RemoteVAEError(f"{message}; is this a service of this project?") from None
    return images


def read_tensor(file: Path) -> Tensor:
    """Return the one tensor in a file.

    Raises:
        ValueError: the file has another type, is damaged, or holds no tensor or several.
    """
    read = READERS.get(file.suffix.lower())
    if not read:
        raise ValueError(f"{file} is no file of latents: expected a name with .safetensors, .npy, .pt or .latent")
    try:
        content = read(file)
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {str(error).partition(chr(10))[0]}") from None
    values = content if isinstance(content, dict) else {type(content).__name__: content}
    match list(values.values()):
        case [Tensor() as tensor]:
            return tensor
    raise ValueError(f"{file} holds {', '.join(map(str, values)) or 'nothing'}: expected one tensor")


def _comfyui_range(client: AnyClient, file: Path, is_raw: bool) -> dict[str, Any]:
    """Return the parameters for the range of a .latent file. Raise `ValueError` if the user names another one."""
    expected = client.config()["latents"]["comfyui"]
    if expected is None:
        raise ValueError(f"{file} holds latents of ComfyUI, which are those of the large VAE: decode it with that")
    if (expected == "raw") != is_raw:
        mend = "raw: add --raw" if expected == "raw" else "normalized for this model: leave --raw out"
        raise ValueError(f"{file} holds latents of ComfyUI, which are {mend}")
    return {} if is_raw else {"normalized": True}


def _comfyui_tensor(tensors: dict[str, Tensor]) -> Tensor:
    """Return the tensor of a .latent file of ComfyUI. Raise `ValueError` for an old one, whose latents are scaled."""
    if "latent_format_version_0" not in tensors:
        raise ValueError("it is of an old ComfyUI, which scaled latents by 0.18215; load and save it in a new one")
    return tensors["latent_tensor"]


def npy_bytes(tensor: Tensor) -> bytes:
    """Return a tensor as a .npy file. numpy has no bfloat16, so that becomes float32."""
    buffer = io.BytesIO()
    np.save(buffer, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
    return buffer.getvalue()


def _write_chunks(file: Path, chunks: Iterator[bytes]) -> list[Path]:
    """Write chunks as they arrive. The file gets its name after the last one."""
    if file == STDOUT:
        for chunk in chunks:
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
        return []
    partial = _partial(file)
    try:
        with partial.open("wb", buffering=0) as output:
            for chunk in chunks:
                output.write(chunk)
        return [partial.replace(file)]
    finally:
        partial.unlink(missing_ok=True)


def write(file: Path, data: bytes) -> Path:
    """Write a file at once: its name never stands for half of it."""
    partial = _partial(file)
    partial.write_bytes(data)
    return partial.replace(file)


def _partial(file: Path) -> Path:
    """Return the name of an incomplete file. It is shorter than every limit of names."""
    return file.with_name(f".{zlib.crc32(os.fsencode(file.name)):08x}.part")
