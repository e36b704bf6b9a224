"""One picture through a live endpoint and back, over the wire protocol, with neither torch nor diffusers."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from time import perf_counter

import httpx2
from PIL import Image, ImageChops, ImageStat
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

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


class _Starting(Exception):
    """No replica is up yet."""


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
    session = httpx2.Client(headers=headers, timeout=httpx2.Timeout(WAKE_UP + 60, connect=30))
    picture = _picture()
    body = io.BytesIO()
    picture.save(body, "PNG")

    with session, out.status("encoding and decoding a picture"):
        encoded, encode_seconds = _post(session, f"{url.rstrip('/')}/encode", content=body.getvalue())
        shape, dtype = _tensor_header(encoded)
        decoded, decode_seconds = _post(
            session,
            f"{url.rstrip('/')}/decode",
            content=encoded.content,
            params={
                "shape": json.dumps(shape),
                "dtype": dtype,
                "image_format": "png",
            },  # a video model answers with an MP4
            headers={"Content-Type": "tensor/binary"},
        )
    video = decoded.content[4:8] == b"ftyp"
    psnr = None if video else _psnr(picture, _read_picture(decoded.content))
    if psnr is not None and psnr < LOWEST_PSNR:
        raise DeployError(
            f"{url} gave back another picture ({psnr:.1f} dB, under {LOWEST_PSNR:.0f}): are the weights its own?"
        )
    return SmokeResult(encode_seconds, decode_seconds, shape, psnr)


def _picture() -> Image.Image:
    """A smooth picture in three colours, so that any trained VAE keeps it."""
    across = Image.linear_gradient("L").resize((SIZE, SIZE))
    return Image.merge("RGB", (across, across.rotate(90), Image.radial_gradient("L").resize((SIZE, SIZE))))


def _post(session: httpx2.Client, url: str, **request: object) -> tuple[httpx2.Response, float]:
    """The answer, and the seconds of the request that got it; while a replica starts it is asked again."""

    def send() -> tuple[httpx2.Response, float]:
        start = perf_counter()
        response = session.post(url, **request)
        if response.status_code in STARTING:
            raise _Starting(f"{url} answers {response.status_code}: no replica is up yet")
        return response, perf_counter() - start

    def tell(state: RetryCallState) -> None:
        if state.attempt_number == 1:
            note(f"  {state.outcome.exception()}; waiting for it")

    retrying = Retrying(
        retry=retry_if_exception_type(_Starting),
        wait=wait_fixed(5),
        stop=stop_after_delay(WAKE_UP),
        before_sleep=tell,
        reraise=True,
    )
    try:
        response, seconds = retrying(send)
    except _Starting as error:
        raise DeployError(f"{error}, after {WAKE_UP // 60} minutes; look again with `make endpoints`") from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise DeployError(f"{url} cannot be reached: {type(error).__name__}; is the address right?") from None
    if response.is_success:
        return response, seconds
    said = _words(response)
    if response.status_code in (401, 403):
        sent = "does not take this token" if "Authorization" in response.request.headers else "takes no one without one"
        raise DeployError(f"{url} answers {response.status_code} and {sent}: {said}")
    raise DeployError(f"{url} answers {response.status_code}: {said}")


def _words(response: httpx2.Response) -> str:
    """The platform's or the service's own."""
    try:
        return str(response.json()["error"])[:300]
    except (ValueError, KeyError, TypeError):
        return " ".join(response.text.split())[:300] or response.reason_phrase


def _tensor_header(response: httpx2.Response) -> tuple[list[int], str]:
    try:
        shape, dtype = json.loads(response.headers["shape"]), response.headers["dtype"]
        width = {"float16": 2, "bfloat16": 2, "float32": 4}[dtype]
    except (KeyError, ValueError):
        raise DeployError(
            f"{response.url} answered an encode with no latents: is it an endpoint of this project?"
        ) from None
    if len(response.content) != math.prod(shape) * width:
        raise DeployError(f"{response.url} answered {len(response.content)} bytes for latents {shape} of {dtype}")
    return shape, dtype


def _read_picture(content: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except OSError:
        raise DeployError(f"a decode was answered with neither a picture nor an MP4: {content[:40]!r}") from None
    if picture.format != "PNG" or picture.size != (SIZE, SIZE):
        raise DeployError(f"a decode gave a {picture.format} of {picture.size}, not a PNG of {(SIZE, SIZE)}")
    return picture.convert("RGB")


def _psnr(expected: Image.Image, actual: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB."""
    squares = ImageStat.Stat(ImageChops.difference(expected, actual)).sum2
    error = sum(squares) / (3 * SIZE * SIZE)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
