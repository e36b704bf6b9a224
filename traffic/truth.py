"""Correct responses: the same weights in plain diffusers, and rules for every response."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path

import av
import diffusers
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from handlers import MODELS
from traffic.files import read_pixels
from traffic.messages import Message, Response
from traffic.samples import Sample
from traffic.servers import ORIGIN

DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}
COUNT = re.compile(r"[1-9][0-9]{0,4}")
NUMBER = re.compile(r"-?[0-9]{1,4}(\.[0-9]{1,6})?")
PLAIN = {
    "shape": COUNT,
    "dtype": re.compile("float16|float32|bfloat16"),
    "scaling_factor": NUMBER,
    "shift_factor": NUMBER,
    "output_type": re.compile("pil|pt|mp4"),
    "partial_postprocess": re.compile("True|False"),
    "image_format": re.compile("png|jpg|webp"),
    "quality": COUNT,
}
"""Spellings of the parameters of a plain decode. A request with other spellings can also be valid."""

TENSOR_TOLERANCE = 2e-3
LOSSY_TOLERANCE = 12
"""Mean difference for JPEG, WebP and H.264, of 255. The samples are noise, which is hardest to encode."""


class Wrong(Exception):
    """A response that breaks a rule, which the text names."""


class Truth:
    def __init__(self, key: str, weights: Path) -> None:
        """Load the model with this key from a folder of weights, on the CPU in float32."""
        model = MODELS[key]
        self.vae = getattr(diffusers, model.vae_class).from_pretrained(weights).eval().requires_grad_(False)
        self.kind = model.kind
        self.channels = model.latent_channels
        self.scale = model.vae_scale_factor

    @torch.inference_mode()
    def expected_for_sample(self, sample: Sample) -> Tensor:
        """Return the decoder's output [B, 3, (F,) H, W], or the latents [B, C, (F,) h, w]."""
        if sample.task == "decode":
            return self.vae.decode(sample.inputs, return_dict=False)[0]
        return self.vae.encode(sample.inputs, return_dict=False)[0].mode()

    @torch.inference_mode()
    def expected_for_message(self, message: Message | None) -> Tensor | None:
        """Return the decoder's output for a plain decode of a tensor, and None for every other request."""
        latents = None if message is None else self._latents(message)
        return None if latents is None else self.vae.decode(latents, return_dict=False)[0]

    @torch.inference_mode()
    def expected_for_file(self, file: bytes) -> Tensor | None:
        """Return the latents of an image or a video by Pillow, FFmpeg and diffusers.

        Return None if they cannot read it.
        """
        images = read_pixels(file, self.kind)
        if images is None or min(images[0].size) < self.scale:
            return None
        if self.kind == "video":
            # The VAE drops frames beyond a multiple of 4, plus 1.
            frames = images[: (len(images) - 1) // 4 * 4 + 1]
            pixels = VideoProcessor(vae_scale_factor=self.scale).preprocess_video(frames)
        else:
            pixels = VaeImageProcessor(vae_scale_factor=self.scale).preprocess(images[0])
        return self.vae.encode(pixels, return_dict=False)[0].mode()

    def _latents(self, message: Message) -> Tensor | None:
        plain = message.method == "POST" and message.path in ("/", "/predict", "/decode")
        if not plain or (message.header("content-type") or "tensor/binary") != "tensor/binary":
            return None
        values: dict[str, list[str]] = {}
        for name, value in message.query:
            values.setdefault(name, []).append(value)
        if "do_scaling" in values or any(name != "shape" and len(sent) > 1 for name, sent in values.items()):
            return None
        if not all(PLAIN[name].fullmatch(value) for name, value in message.query if name in PLAIN):
            return None
        shape, dtype = [int(size) for size in values.get("shape", [])], values.get("dtype", [""])[0]
        dimensions = 5 if self.kind == "video" else 4
        if len(shape) != dimensions or shape[1] != self.channels or dtype not in DTYPES:
            return None
        if len(message.body) != math.prod(shape) * DTYPES[dtype].itemsize:
            return None
        latents = torch.frombuffer(bytearray(message.body), dtype=DTYPES[dtype]).reshape(shape).float()
        factor, shift = (float(values.get(name, [0])[0]) for name in ("scaling_factor", "shift_factor"))
        return latents / (factor or 1) + shift


def check(
    response: Response,
    message: Message | None = None,
    expected: Tensor | None = None,
    *,
    method: str = "POST",
    http: bool = True,
    good: bool = False,
) -> None:
    """Raise `Wrong` unless the response is a correct error or a correct success.

    Args:
        message: the request, if its content is known.
        expected: the output of the VAE in plain diffusers, if it is known.
        method: method of the request.
        http: whether the request is HTTP. The server may refuse other bytes in plain text.
        good: whether only success is correct.
    """
    if good and response.status != 200:
        raise Wrong(f"status {response.status} for a good request: {response.body[:200]!r}")
    if not http and response.status == 400 and not response.body:
        return  # uvicorn refused it after the service had begun to respond
    if response.is_plain_refusal:
        if http:
            raise Wrong("uvicorn refused a request that is HTTP")
    elif (
        method == "OPTIONS"
        and response.media_type == "text/plain"
        and "origin" in response.headers.get("vary", "").lower()
    ):
        if response.status not in (200, 400):  # a preflight, which only a browser reads
            raise Wrong(f"status {response.status} for a preflight")
    elif method == "HEAD" and response.status < 500:
        if response.body:
            raise Wrong("a response to HEAD has a body")
    elif response.status == 200:
        if method == "POST" and message is not None and is_foreign(message):
            raise Wrong("a page of another origin may call")
        if method == "GET" and response.media_type == "application/json":
            if "version" not in json.loads(response.body):  # the response of `/config`
                raise Wrong(f"no config: {response.body[:200]!r}")
        elif response.media_type not in ("text/plain", "text/html"):
            check_success(response, message, expected)
        elif message is not None and method != "GET":  # the response of health and metrics
            raise Wrong(f"plain text for {method}: {response.body[:200]!r}")
    elif 400 <= response.status < 500:
        check_error(response)
    else:
        raise Wrong(f"status {response.status}: {response.body[:200]!r}")


def is_foreign(message: Message) -> bool:
    """Return whether a page of an origin that may not call sends a request, by its browser's headers."""
    origin, site = message.header("origin"), message.header("sec-fetch-site")
    return origin != ORIGIN and (site in ("cross-site", "same-site") or origin == "https://b.example")


def check_error(response: Response) -> None:
    """Raise `Wrong` unless the body is a JSON object with a text under `error`."""
    try:
        error = json.loads(response.body)["error"]
    except (ValueError, KeyError, TypeError):
        error = None
    if not isinstance(error, str) or not error or response.media_type != "application/json":
        raise Wrong(f"status {response.status} is not JSON with a text under `error`: {response.body[:200]!r}")


def check_refusal(response: Response) -> None:
    """Raise `Wrong` unless the response is a 503 with `Retry-After`, as a client under load should get it."""
    check_error(response)
    if response.status != 503 or not response.headers.get("retry-after", "").isdigit():
        raise Wrong(f"status {response.status} without Retry-After: {response.body[:200]!r}")


def check_success(response: Response, message: Message | None, expected: Tensor | None) -> None:
    """Raise `Wrong` unless the response is well-formed and equals `expected`."""
    try:
        content = read(response)
    except Exception as error:  # a reader raised: the content does not match the headers
        raise Wrong(f"the response cannot be read: {type(error).__name__}: {error}") from None
    if expected is None:
        return
    if not expected.isfinite().all():
        raise Wrong("a success where the VAE gives NaN or infinity")
    if isinstance(content, Tensor):
        _compare_tensor(content, message, expected)
    else:
        _compare_images(content, message, expected, lossy=response.media_type != "image/png")


def read(response: Response) -> Tensor | np.ndarray:
    """Return a tensor, or a file's images as uint8 [N, H, W, 3].

    Raises `ValueError` and the exceptions of the readers of files.
    """
    body, headers = response.body, response.headers
    if response.media_type == "application/json":
        message = json.loads(body)
        if isinstance(message, str):
            return read_file(base64.b64decode(message, validate=True))
        body, parameters = base64.b64decode(message["inputs"], validate=True), message["parameters"]
        return read_tensor(body, parameters["shape"], parameters["dtype"])
    if response.media_type == "tensor/binary":
        return read_tensor(body, json.loads(headers["shape"]), headers["dtype"])
    if response.media_type not in ("image/png", "image/jpeg", "image/webp", "video/mp4"):
        raise ValueError(f"Content-Type {response.media_type!r}")
    return read_file(body)


def read_tensor(body: bytes, shape: list[int], dtype: str) -> Tensor:
    if math.prod(shape) * DTYPES[dtype].itemsize != len(body):
        raise ValueError(f"shape {shape} of {dtype}, but {len(body)} bytes")
    return torch.frombuffer(bytearray(body), dtype=DTYPES[dtype]).reshape(shape)


def read_file(body: bytes) -> np.ndarray:
    if body[4:8] == b"ftyp":
        if b"moof" in body and body[-12:-8] != b"mfro":
            raise ValueError("a streamed video without its last box")
        with av.open(io.BytesIO(body)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))[None]


def _compare_tensor(content: Tensor, message: Message | None, expected: Tensor) -> None:
    query = dict(message.query) if message else {}
    if content.dtype == torch.uint8:
        expected = _uint8(expected)
    elif query.get("output_type") == "pil":
        expected = (expected / 2 + 0.5).clamp(0, 1)
    if content.shape != expected.shape:
        raise Wrong(f"shape {list(content.shape)} instead of {list(expected.shape)}")
    worst = (content.float() - expected.float()).abs().max().item()
    scale = max(1.0, expected.float().abs().max().item())
    if worst > (1 if content.dtype == torch.uint8 else TENSOR_TOLERANCE * scale):
        raise Wrong(f"values differ from diffusers' by {worst:.3g}")


def _compare_images(content: np.ndarray, message: Message | None, expected: Tensor, lossy: bool) -> None:
    frames = _uint8(expected).numpy()
    if content.shape != frames.shape:
        raise Wrong(f"images {list(content.shape)} instead of {list(frames.shape)}")
    difference = np.abs(content.astype(np.int16) - frames)
    if lossy and message is not None and "quality" in dict(message.query):
        return
    if difference.mean() > LOSSY_TOLERANCE if lossy else difference.max() > 1:
        raise Wrong(f"pixels differ from diffusers' by {difference.max()}, {difference.mean():.3g} in the mean")


def _uint8(decoded: Tensor) -> Tensor:
    """Convert the decoder's output to uint8 [B, H, W, 3], or [F, H, W, 3] for a video."""
    images = decoded[0].movedim(1, 0) if decoded.ndim == 5 else decoded
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
