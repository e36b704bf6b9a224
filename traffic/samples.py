"""Good requests, small enough for a CPU: every path, output kind and form of body that clients use."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from handlers import MODELS
from handlers.base import EndpointHandler
from handlers.serving.media.output import describe, tensor_bytes, write_mp4
from traffic.messages import Message

TENSOR = (("Content-Type", "tensor/binary"),)
FRAMES = 5


@dataclass(frozen=True)
class Sample:
    name: str
    message: Message
    task: str
    """"decode" or "encode"."""
    inputs: Tensor
    """Input of the VAE: raw latents, or pixels in [-1, 1], with a batch dimension."""


def samples(key: str, sides: tuple[int, ...] = (32, 64)) -> list[Sample]:
    """Return requests to a model for each side length in pixels. Each side has other contents."""
    requests = []
    for seed, side in enumerate(sides):
        make = _video_samples if MODELS[key].kind == "video" else _image_samples
        requests += make(MODELS[key], side, torch.Generator().manual_seed(seed))
    return requests


def large(key: str) -> Sample:
    """Return a decode of 512x512 pixels to 3 MB, which takes a CPU a while."""
    channels = MODELS[key].latent_channels
    side = 512 // MODELS[key].vae_scale_factor
    latents = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    return Sample("large", _tensor(latents, output_type="pt"), "decode", latents)


def stream(key: str) -> Sample:
    """Return a streamed decode of 25 frames of 64x96 pixels in two chunks."""
    latents = torch.randn(1, MODELS[key].latent_channels, 7, 8, 12, generator=torch.Generator().manual_seed(0))
    return Sample("stream", _tensor(latents, stream="true"), "decode", latents)


def any_size(key: str, rng: Random, pixels: int = 2**20) -> Message:
    """Return a decode or encode of 1 to 4 images with sides of 64 to 768, at most `pixels` in all."""
    factor = MODELS[key].vae_scale_factor
    height, width = (rng.randrange(64 // factor, 768 // factor + 1) for _ in range(2))
    batch = rng.randint(1, min(4, pixels // (height * width * factor**2)))
    if rng.random() < 0.5:
        uint8 = torch.zeros(batch, height * factor, width * factor, 3, dtype=torch.uint8)
        return replace(_tensor(uint8), path="/encode")
    channels = MODELS[key].published_config["latent_channels"]
    return _tensor(torch.zeros(batch, channels, height, width), output_type="pt")


def _image_samples(model: type[EndpointHandler], side: int, generator: torch.Generator) -> list[Sample]:
    channels, wide, factor = model.latent_channels, side + 16, model.vae_scale_factor
    latents = torch.randn(1, channels, side // factor, wide // factor, generator=generator)
    packed = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
    packed = packed.reshape(1, -1, channels * 4)
    factors = {"scaling_factor": 0.5, "shift_factor": 0.25}
    scaled = (latents - 0.25) * 0.5
    uint8 = torch.randint(0, 256, (side, wide, 3), generator=generator, dtype=torch.uint8)
    pixels = uint8.permute(2, 0, 1)[None].float() / 127.5 - 1
    image = Image.fromarray(uint8.numpy())
    jpeg = _file(image, "jpeg", quality=90)
    webp = _file(image, "webp", lossless=True)
    shape_in_json = {"shape": list(latents.shape), "dtype": "float32"}
    json_form = (("Content-Type", "application/json"),)
    base64_form = (("Content-Type", "tensor/base64"), ("Accept", "tensor/base64"))
    decode, encode = "decode", "encode"
    return [
        Sample("png", _tensor(latents, image_format="png"), decode, latents),
        Sample("jpg", replace(_tensor(latents), path="/decode"), decode, latents),
        Sample("webp", _tensor(latents, image_format="webp", quality=80), decode, latents),
        Sample("pt", _tensor(scaled.half(), output_type="pt", **factors), decode,
               scaled.half().float() / 0.5 + 0.25),
        Sample("uint8", _tensor(latents.bfloat16(), output_type="pt", partial_postprocess=True), decode,
               latents.bfloat16().float()),
        Sample("batch", _tensor(torch.cat([latents, -latents]), output_type="pt"), decode,
               torch.cat([latents, -latents])),
        Sample("unbatched", _tensor(latents[0], image_format="png"), decode, latents),
        Sample("packed", _tensor(packed, image_format="png", height=side, width=wide), decode, latents),
        Sample("base64", replace(_tensor(latents, output_type="pt"), headers=base64_form,
                                 body=_json(tensor_bytes(latents))), decode, latents),
        Sample("json", Message(path="/predict", headers=json_form,
                               body=_json(tensor_bytes(latents), **shape_in_json)), decode, latents),
        Sample("encode png", Message(path="/encode", body=_file(image, "png")), encode, pixels),
        Sample("encode jpeg", Message(body=jpeg, headers=(("Content-Type", "image/jpeg"),)), encode, _pixels(jpeg)),
        Sample("encode webp", Message(body=webp), encode, pixels),
        Sample("encode pixels", replace(_tensor(pixels), path="/encode"), encode, pixels),
        Sample("encode uint8", replace(_tensor(uint8[None]), path="/encode"), encode, pixels),
        Sample("encode json", Message(path="/predict", headers=json_form, body=_json(_file(image, "png"))), encode,
               pixels),
    ]  # fmt: skip


def _video_samples(model: type[EndpointHandler], side: int, generator: torch.Generator) -> list[Sample]:
    channels, wide = model.latent_channels, side + 16
    latents = torch.randn(1, channels, 2, side // 8, wide // 8, generator=generator)
    small = torch.rand(FRAMES, 3, side // 8, wide // 8, generator=generator)
    frames = (torch.nn.functional.interpolate(small, (side, wide), mode="bilinear") * 255).to(torch.uint8)
    pixels = frames.movedim(0, 1)[None].float() / 127.5 - 1
    mp4 = write_mp4(frames.permute(0, 2, 3, 1).contiguous().numpy(), fps=8)
    decode, encode = "decode", "encode"
    return [
        Sample("mp4", _tensor(latents, output_type="mp4"), decode, latents),
        Sample("mp4 stream", _tensor(latents, output_type="mp4", stream="true"), decode, latents),
        Sample("video pt", _tensor(latents, output_type="pt"), decode, latents),
        Sample("encode mp4", Message(path="/encode", body=mp4), encode, _frames(mp4)),
        Sample("encode frames", replace(_tensor(pixels), path="/encode"), encode, pixels),
    ]


def _tensor(tensor: Tensor, **parameters: Any) -> Message:
    shape, dtype = describe(tensor)
    query = [("shape", str(size)) for size in shape] + [("dtype", dtype)]
    query += [(name, str(value)) for name, value in parameters.items()]
    return Message(query=tuple(query), headers=TENSOR, body=tensor_bytes(tensor))


def _json(payload: bytes, **parameters: Any) -> bytes:
    return json.dumps({"inputs": base64.b64encode(payload).decode(), "parameters": parameters}).encode()


def _file(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _pixels(file: bytes) -> Tensor:
    """Return the pixels of an image file as [1, 3, H, W] in [-1, 1]."""
    array = np.array(Image.open(io.BytesIO(file)).convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1


def _frames(file: bytes) -> Tensor:
    """Return the frames of an MP4 file as [1, 3, F, H, W] in [-1, 1]."""
    with av.open(io.BytesIO(file)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
