"""One picture through a live endpoint and back, over the wire protocol, with neither torch nor diffusers."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import httpx2
from PIL import Image, ImageChops, ImageStat
from tenacity import RetryCallState, Retrying, retry_if_result, stop_after_delay, wait_fixed

from scripts.deployment.console import DeployError, note, out

SIZE = 256
"""Pixels, height and width."""
LOWEST_PSNR = 15.0
"""dB; what comes back through these VAEs is above 25, a black or grey picture below 12."""
STARTING = (502, 503, 504)
"""What the proxy answers while a replica starts."""
WAKE_UP = 600
"""Seconds that a request waits for an endpoint which has scaled to zero."""
HOSTS = ".endpoints.huggingface.cloud"
"""An address under any other host gets no token, unless the Endpoints API itself named it."""


@dataclass(frozen=True)
class SmokeResult:
    """Seconds of the two requests, the latents' shape and the picture's PSNR in dB (None for a video)."""

    encode: float
    decode: float
    shape: list[int]
    psnr: float | None

    def __str__(self) -> str:
        quality = "an MP4 video" if self.psnr is None else f"the picture at {self.psnr:.1f} dB"
        return (
            f"encode {self.encode:.2f} s, decode {self.decode:.2f} s: {SIZE}x{SIZE} pixels became latents "
            f"{self.shape}, and {quality} came back"
        )


def is_hugging_face(url: str) -> bool:
    try:
        address = httpx2.URL(url)
    except httpx2.InvalidURL:
        return False
    return address.scheme == "https" and address.host.endswith(HOSTS)


def smoke_test(url: str, token: str | None) -> SmokeResult:
    """Encodes a picture and decodes what comes back.

    Raises:
        DeployError: an answer is not what the protocol promises, or the picture is lost.
    """
    headers = {"X-Scale-Up-Timeout": str(WAKE_UP), **({"Authorization": f"Bearer {token}"} if token else {})}
    across = Image.linear_gradient("L").resize((SIZE, SIZE))  # smooth, so that any trained VAE keeps it
    picture = Image.merge("RGB", (across, across.rotate(90), Image.radial_gradient("L").resize((SIZE, SIZE))))
    body = io.BytesIO()
    picture.save(body, "PNG")
    url = url.rstrip("/")
    with (
        httpx2.Client(headers=headers, timeout=httpx2.Timeout(WAKE_UP + 60, connect=30)) as session,
        out.status("encoding and decoding a picture"),
    ):
        encoded, encode_seconds = _post(session, f"{url}/encode", content=body.getvalue())
        try:
            shape, dtype = json.loads(encoded.headers["shape"]), encoded.headers["dtype"]
            size = math.prod(shape) * {"float16": 2, "bfloat16": 2, "float32": 4}[dtype]
        except (KeyError, ValueError):
            raise DeployError(f"{url} answered an encode with no latents: is it an endpoint of this project?") from None
        if len(encoded.content) != size:
            raise DeployError(f"{url} answered {len(encoded.content)} bytes for latents {shape} of {dtype}")
        # a video model answers with an MP4
        parameters = {"shape": json.dumps(shape), "dtype": dtype, "image_format": "png"}
        request = {"content": encoded.content, "params": parameters, "headers": {"Content-Type": "tensor/binary"}}
        decoded, decode_seconds = _post(session, f"{url}/decode", **request)
    psnr = None if decoded.content[4:8] == b"ftyp" else _psnr(picture, decoded.content)
    if psnr is not None and psnr < LOWEST_PSNR:
        raise DeployError(
            f"{url} gave back another picture ({psnr:.1f} dB, under {LOWEST_PSNR:.0f}): are the weights its own?"
        )
    return SmokeResult(encode_seconds, decode_seconds, shape, psnr)


def _post(session: httpx2.Client, url: str, **request: Any) -> tuple[httpx2.Response, float]:
    """The answer, and the seconds of the request that got it; while a replica starts it is asked again."""

    def send() -> tuple[httpx2.Response, float]:
        start = perf_counter()
        return session.post(url, **request), perf_counter() - start

    def tell(state: RetryCallState) -> None:
        if state.attempt_number == 1:
            note(f"  {url} answers {state.outcome.result()[0].status_code}: no replica is up yet; waiting for it")

    try:
        response, seconds = Retrying(
            retry=retry_if_result(lambda answer: answer[0].status_code in STARTING),
            wait=wait_fixed(5),
            stop=stop_after_delay(WAKE_UP),
            before_sleep=tell,
            retry_error_callback=lambda state: state.outcome.result(),
        )(send)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise DeployError(f"{url} cannot be reached: {type(error).__name__}; is the address right?") from None
    if response.is_success:
        return response, seconds
    try:
        said = str(response.json()["error"])[:300]
    except (ValueError, KeyError, TypeError):
        said = " ".join(response.text.split())[:300] or response.reason_phrase
    refused = ""
    if response.status_code in (401, 403):
        refused = (
            " and does not take this token"
            if "Authorization" in session.headers
            else " and takes no one without a token"
        )
    raise DeployError(f"{url} answers {response.status_code}{refused}: {said}")


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
