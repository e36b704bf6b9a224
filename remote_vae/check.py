"""Check of an endpoint: a small image is encoded and decoded over HTTP, with neither torch nor diffusers."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageStat

from remote_vae.client import Client, RemoteVAEError
from remote_vae.text import read_shape

logger = logging.getLogger("remote_vae")

SIZE = 256
"""Height and width of the image in pixels."""
MIN_PSNR = 15.0
"""dB. These VAEs return the image at 25 dB or more; a black or gray image has less than 12."""
VIDEO_NDIM = 5
"""Dimensions of a video's latents."""
START_TIMEOUT = 600
"""Seconds to wait for an endpoint that has scaled to zero."""


@dataclass(frozen=True)
class RoundTrip:
    """Seconds of both requests, the shape of the latents, and the image's PSNR in dB (None for a video)."""

    encode: float
    decode: float
    shape: list[int]
    psnr: float | None

    def __str__(self) -> str:
        result = "an MP4 video" if self.psnr is None else f"the image, at {self.psnr:.1f} dB"
        seconds = f"encode {self.encode:.2f} s, decode {self.decode:.2f} s"
        return f"{seconds}: {SIZE}x{SIZE} pixels became latents {self.shape}, and these became {result}"


def check(url: str, token: str | None = None, report: Callable[[str], None] = logger.warning) -> RoundTrip:
    """Encode an image and decode its latents.

    Args:
        url: URL of the endpoint.
        token: token for this URL. None: the Hugging Face login, for hosts of Inference Endpoints.
        report: function that gets a line while the endpoint starts.

    Raises:
        RemoteVAEError: a response is not what the protocol says, or `url` is no URL of an endpoint.
    """
    try:
        client = Client(url, token, retry_timeout=START_TIMEOUT, timeout=START_TIMEOUT + 60, report=report)
    except ValueError as error:
        raise RemoteVAEError(str(error)) from None
    image = _smooth_image()
    body = io.BytesIO()
    image.save(body, "PNG")
    headers = {"X-Scale-Up-Timeout": str(START_TIMEOUT)}  # the platform holds the request while a replica starts
    scaling: dict[str, str] = {}
    try:
        encoded = client.request("POST", "/encode", content=body.getvalue(), headers=headers)
    except RemoteVAEError:
        if not _declared(client, "takes_scaled", False):
            raise
        scaling = {"do_scaling": "true", "normalized": "true"}
        encoded = client.request("POST", "/encode", content=body.getvalue(), params=scaling, headers=headers)
    try:
        shape = read_shape(encoded.headers.get("shape", ""))
    except ValueError as error:
        message = f"{url}/encode: the response is no latents ({error}); is this an endpoint of this project?"
        raise RemoteVAEError(message) from None
    # a video model responds with an MP4
    parameters = {"shape": shape, "dtype": encoded.headers.get("dtype", ""), "image_format": "png", **scaling}
    headers["Content-Type"] = "tensor/binary"
    try:
        decoded = client.request("POST", "/decode", content=encoded.content, params=parameters, headers=headers)
    except RemoteVAEError:
        least = _declared(client, "least_frames", 1)
        if len(shape) != VIDEO_NDIM or least == 1:
            raise
        shape[2] = least  # a model that decodes no single frame
        latents = _repeat(encoded.content, shape[0] * shape[1], least)
        decoded = client.request("POST", "/decode", content=latents, params=parameters, headers=headers)
    psnr = None if len(shape) == VIDEO_NDIM and _is_mp4(decoded.content) else _psnr(image, decoded.content)
    if psnr is not None and psnr < MIN_PSNR:
        message = f"the decoded image differs from the original: {psnr:.1f} dB, expected {MIN_PSNR:.0f} dB or more"
        raise RemoteVAEError(f"{url}: {message}; does the endpoint have the weights of its model?")
    return RoundTrip(encoded.seconds, decoded.seconds, shape, psnr)


def _smooth_image() -> Image.Image:
    """Return an image of gradients, which any trained VAE preserves."""
    gradient = Image.linear_gradient("L").resize((SIZE, SIZE))
    radial = Image.radial_gradient("L").resize((SIZE, SIZE))
    return Image.merge("RGB", (gradient, gradient.rotate(90), radial))


def _declared(client: Client, entry: str, default: int) -> int:
    """Return an entry of the latents in `/config`. Without a config, the first error says more."""
    try:
        return int(client.config()["latents"][entry])
    except RemoteVAEError:
        return default


def _repeat(latents: bytes, channels: int, frames: int) -> bytes:
    """Return latents of one frame as a video of so many equal frames."""
    size = len(latents) // channels
    return b"".join(latents[start : start + size] * frames for start in range(0, len(latents), size))


def _is_mp4(content: bytes) -> bool:
    """Check the first box, and a box that every MP4 file has."""
    return content[4:8] == b"ftyp" and b"moov" in content


def _psnr(expected: Image.Image, content: bytes) -> float:
    """Return the peak signal-to-noise ratio of a PNG file in dB."""
    try:
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        if image.size != (SIZE, SIZE):  # before its pixels take memory
            raise RemoteVAEError(f"the decoded image has the size {image.size}: expected {(SIZE, SIZE)}")
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        message = f"the response to a decode is neither PNG nor MP4, and begins with {content[:40]!r}"
        raise RemoteVAEError(message) from None
    error = sum(ImageStat.Stat(ImageChops.difference(expected, image.convert("RGB"))).sum2) / (3 * SIZE * SIZE)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
