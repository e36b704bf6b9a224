"""One picture through a live endpoint and back, over the wire protocol, with neither torch nor diffusers."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageStat
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_fixed

from remote_vae import Client, RemoteVAEError
from scripts.deployment.console import DeployError, note, out

SIZE = 256
"""Pixels, height and width."""
LOWEST_PSNR = 15.0
"""dB; what comes back through these VAEs is above 25, a black or grey picture below 12."""
STARTING = (502, 503, 504)
"""What the proxy answers while a replica starts."""
WAKE_UP = 600
"""Seconds that a request waits for an endpoint which has scaled to zero."""


def tell(state: RetryCallState) -> None:
    if state.attempt_number == 1:
        note(f"  {state.outcome.exception()}; no replica is up yet, waiting for it")


starts = retry_if_exception(lambda error: getattr(error, "status", None) in STARTING)
waiting = Retrying(retry=starts, wait=wait_fixed(5), stop=stop_after_delay(WAKE_UP), before_sleep=tell, reraise=True)


@dataclass(frozen=True)
class SmokeResult:
    """Seconds of the two requests, the latents' shape and the picture's PSNR in dB (None for a video)."""

    encode: float
    decode: float
    shape: list[int]
    psnr: float | None

    def __str__(self) -> str:
        back = "an MP4 video" if self.psnr is None else f"the picture at {self.psnr:.1f} dB"
        took = f"encode {self.encode:.2f} s, decode {self.decode:.2f} s"
        return f"{took}: {SIZE}x{SIZE} pixels became latents {self.shape}, and {back} came back"


def smoke_test(url: str, token: str | None = None) -> SmokeResult:
    """Encodes a picture and decodes what comes back; `DeployError` where that is not what the protocol promises.

    `token` is sent to this address; None sends the user's own, to the hosts of Inference Endpoints alone.
    """
    across = Image.linear_gradient("L").resize((SIZE, SIZE))  # smooth, so that any trained VAE keeps it
    picture = Image.merge("RGB", (across, across.rotate(90), Image.radial_gradient("L").resize((SIZE, SIZE))))
    body = io.BytesIO()
    picture.save(body, "PNG")
    held = {"X-Scale-Up-Timeout": str(WAKE_UP)}
    try:
        client = Client(url, token, patience=0, timeout=WAKE_UP + 60)
        with out.status("encoding and decoding a picture"):
            encoded = waiting(client.request, "POST", "/encode", content=body.getvalue(), headers=held)
            if not encoded.headers.keys() >= {"shape", "dtype"}:
                raise DeployError(f"{url} answered an encode with no latents: is it an endpoint of this project?")
            shape = json.loads(encoded.headers["shape"])
            # a video model answers with an MP4
            sent = {"shape": encoded.headers["shape"], "dtype": encoded.headers["dtype"], "image_format": "png"}
            held["Content-Type"] = "tensor/binary"
            decoded = waiting(client.request, "POST", "/decode", content=encoded.content, params=sent, headers=held)
    except (RemoteVAEError, ValueError) as error:
        raise DeployError(str(error)) from None
    psnr = None if decoded.content[4:8] == b"ftyp" else _psnr(picture, decoded.content)
    if psnr is not None and psnr < LOWEST_PSNR:
        lost = f"{psnr:.1f} dB, under {LOWEST_PSNR:.0f}"
        raise DeployError(f"{url} gave back another picture ({lost}): are the weights its own?")
    return SmokeResult(encoded.elapsed.total_seconds(), decoded.elapsed.total_seconds(), shape, psnr)


def _psnr(expected: Image.Image, content: bytes) -> float:
    """Peak signal-to-noise ratio in dB."""
    try:
        actual = Image.open(io.BytesIO(content))
        actual.load()
    except OSError:
        raise DeployError(f"a decode was answered with neither a picture nor an MP4: {content[:40]!r}") from None
    if actual.format != "PNG" or actual.size != (SIZE, SIZE):
        raise DeployError(f"a decode gave a {actual.format} of {actual.size}, not a PNG of {(SIZE, SIZE)}")
    error = sum(ImageStat.Stat(ImageChops.difference(expected, actual.convert("RGB"))).sum2) / (3 * SIZE * SIZE)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
