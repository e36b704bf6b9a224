"""One picture through an endpoint and back, over the wire protocol, with neither torch nor diffusers."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageStat
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_fixed

from remote_vae.client import Client, RemoteVAEError
from remote_vae.text import read_shape

logger = logging.getLogger("remote_vae")

SIZE = 256
"""Pixels, height and width."""
LOWEST_PSNR = 15.0
"""dB; what comes back through these VAEs is above 25, a black or grey picture below 12."""
STARTING = (502, 503, 504)
"""What the proxy answers while a replica starts."""
VIDEO = 5
"""Dimensions of a video's latents."""
WAKE_UP = 600
"""Seconds that a request waits for an endpoint which has scaled to zero."""


@dataclass(frozen=True)
class RoundTrip:
    """Seconds of the two requests, the latents' shape and the picture's PSNR in dB (None for a video)."""

    encode: float
    decode: float
    shape: list[int]
    psnr: float | None

    def __str__(self) -> str:
        back = "an MP4 video" if self.psnr is None else f"the picture at {self.psnr:.1f} dB"
        took = f"encode {self.encode:.2f} s, decode {self.decode:.2f} s"
        return f"{took}: {SIZE}x{SIZE} pixels became latents {self.shape}, and {back} came back"


def check(url: str, token: str | None = None, tell: Callable[[str], None] = logger.warning) -> RoundTrip:
    """Encodes a picture and decodes what comes back.

    Args:
        token: sent to this address; None sends the user's own, to the hosts of Inference Endpoints alone.
        tell: gets a line where a replica has to be waited for.

    Raises:
        RemoteVAEError: what came is not what the protocol promises, or `url` is no URL.
    """
    across = Image.linear_gradient("L").resize((SIZE, SIZE))  # smooth, so that any trained VAE keeps it
    picture = Image.merge("RGB", (across, across.rotate(90), Image.radial_gradient("L").resize((SIZE, SIZE))))
    body = io.BytesIO()
    picture.save(body, "PNG")
    held = {"X-Scale-Up-Timeout": str(WAKE_UP)}
    waiting = Retrying(
        retry=retry_if_exception(lambda error: getattr(error, "status", None) in STARTING),
        wait=wait_fixed(5),
        stop=stop_after_delay(WAKE_UP),
        before_sleep=lambda state: tell(_waits(state)) if state.attempt_number == 1 else None,
        reraise=True,
    )
    try:
        client = Client(url, token, patience=0, timeout=WAKE_UP + 60)
    except ValueError as error:
        raise RemoteVAEError(str(error)) from None
    encoded = waiting(client.request, "POST", "/encode", content=body.getvalue(), headers=held)
    try:
        shape = read_shape(encoded.headers.get("shape", ""))
    except ValueError as error:
        message = f"{url} responded to /encode with no latents ({error}): is it an endpoint of this project?"
        raise RemoteVAEError(message) from None
    # a video model responds with an MP4
    sent = {"shape": shape, "dtype": encoded.headers.get("dtype", ""), "image_format": "png"}
    held["Content-Type"] = "tensor/binary"
    decoded = waiting(client.request, "POST", "/decode", content=encoded.content, params=sent, headers=held)
    psnr = None if len(shape) == VIDEO and _is_mp4(decoded.content) else _psnr(picture, decoded.content)
    if psnr is not None and psnr < LOWEST_PSNR:
        lost = f"{psnr:.1f} dB, under {LOWEST_PSNR:.0f}"
        raise RemoteVAEError(f"{url} gave back another picture ({lost}): are the weights its own?")
    return RoundTrip(encoded.seconds, decoded.seconds, shape, psnr)


def _waits(state: RetryCallState) -> str:
    return f"{state.outcome and state.outcome.exception()}; no replica is up yet, waiting for it"


def _is_mp4(content: bytes) -> bool:
    """By its first box, and the one that every MP4 has."""
    return content[4:8] == b"ftyp" and b"moov" in content


def _psnr(expected: Image.Image, content: bytes) -> float:
    """Peak signal-to-noise ratio in dB."""
    try:
        actual = Image.open(io.BytesIO(content), formats=["PNG"])
        if actual.size != (SIZE, SIZE):  # before its pixels take memory
            raise RemoteVAEError(f"a decode gave an image of {actual.size}, not of {(SIZE, SIZE)}")
        actual.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        message = f"a decode was answered with neither a PNG nor an MP4: {content[:40]!r}"
        raise RemoteVAEError(message) from None
    error = sum(ImageStat.Stat(ImageChops.difference(expected, actual.convert("RGB"))).sum2) / (3 * SIZE * SIZE)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
