"""Tests of small files with large declared sizes, or slow to read, sent to `tiny` in 2 GB.

The server must survive, and other clients must not wait.
"""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import requests
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from scripts.local_server import ROOT
from tests.support.small_service import as_tensor
from traffic.memory_limit import LimitedServer, limited_server

LIMIT = 2 * 10**9


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LimitedServer]:
    log = tmp_path_factory.mktemp("limited") / "log"
    with limited_server(LIMIT, "--model", "tiny", "--weights", str(ROOT / "models" / "tiny"), log=log) as running:
        yield running


@pytest.fixture(scope="module")
def vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL.from_pretrained(ROOT / "models" / "tiny").eval().requires_grad_(False)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def black_png(side: int) -> bytes:
    """Return a PNG of side x side black pixels with all of its data."""
    compress, row = zlib.compressobj(1), bytes(side * 3 + 1)
    data = b"".join(compress.compress(row) for _ in range(side)) + compress.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(side: int = 16, says: int | None = None, progressive: bool = False, inside: bytes = b"") -> bytes:
    """Return a black JPEG whose header declares another side, with `inside` after its first segment."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, format="JPEG", progressive=progressive)
    body = buffer.getvalue()
    if says:
        offset = body.index(b"\xff\xc2" if progressive else b"\xff\xc0") + 5
        body = body[:offset] + struct.pack(">HH", says, says) + body[offset + 4 :]
    return body[:20] + inside + body[20:]


def webp(side: int) -> bytes:
    """Return the header of a WebP of side x side pixels, without an image."""
    sides = (side - 1).to_bytes(3, "little") * 2
    return b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0" + sides


def one_file(body: bytes) -> dict:
    return {"data": body}


def form(body: bytes, count: int) -> dict:
    return {"files": [("file", (f"{number}.png", body)) for number in range(count)]}


HOSTILE = {
    "a JPEG that says it is large": lambda: one_file(jpeg(says=7000)),
    "a progressive JPEG that says it is large": lambda: one_file(jpeg(says=7000, progressive=True)),
    "a form of 60 large PNGs": lambda: form(black_png(1400), 60),
    "a PNG of as many pixels as the limit": lambda: one_file(black_png(11313)),
    "a WebP of as many pixels as the limit": lambda: one_file(webp(11313)),
    "fill bytes": lambda: one_file(jpeg(inside=b"\xff" * 20_000_000)),
    "empty segments": lambda: one_file(jpeg(inside=b"\xff\xe5\0\2" * 5_000_000)),
    "empty chunks": lambda: one_file(black_png(16)[:33] + chunk(b"vaEx", b"") * 1_666_666 + black_png(16)[33:]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_two_crafted_files_at_once_do_no_harm(server: LimitedServer, vae: diffusers.AutoencoderKL, kind: str) -> None:
    message = HOSTILE[kind]()
    latents = torch.randn(1, vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = vae.decode(latents).sample

    def send() -> tuple[requests.Response, float]:
        start = time.monotonic()
        return requests.post(f"{server.url}/encode", **message, timeout=60), time.monotonic() - start

    def decode() -> torch.Tensor:
        parameters = {"shape": list(latents.shape), "dtype": "float32", "output_type": "pt"}
        headers = {"Content-Type": "tensor/binary", "Accept": "tensor/binary"}
        body = latents.numpy().tobytes()
        return as_tensor(
            requests.post(f"{server.url}/decode", data=body, params=parameters, headers=headers, timeout=10)
        )

    with ThreadPoolExecutor(3) as clients:
        sent = [clients.submit(send) for _ in range(2)]
        time.sleep(0.2)
        torch.testing.assert_close(clients.submit(decode).result(), expected, atol=1e-4, rtol=0)
        responses = [future.result() for future in sent]
    for response, seconds in responses:
        assert response.status_code in ((200,) if kind == "fill bytes" else (400, 413, 422, 503)), response.text
        assert response.ok or list(response.json()) == ["error"]
        assert seconds < 10
    assert server.is_alive
    assert server.peak <= LIMIT
    torch.testing.assert_close(decode(), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_an_image_that_fits_is_encoded_within_the_limit(server: LimitedServer, vae: diffusers.AutoencoderKL) -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (512, 512, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    response = requests.post(f"{server.url}/encode", data=buffer.getvalue(), timeout=60)
    with torch.no_grad():
        expected = vae.encode(VaeImageProcessor().preprocess(image)).latent_dist.mode()
    torch.testing.assert_close(as_tensor(response), expected, atol=1e-3, rtol=0)
    assert server.is_alive
    assert server.peak <= LIMIT
