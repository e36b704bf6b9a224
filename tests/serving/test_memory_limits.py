"""Tests of small files with large declared sizes, or slow to read, sent to a server in 2 GB.

The server must survive, other clients must not wait, and no file may be written.
"""

from __future__ import annotations

import io
import math
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import diffusers
import numpy as np
import pytest
import requests
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from PIL import Image

from scripts.local_server import ROOT
from tests.support.small_service import as_tensor
from traffic import mp4_files
from traffic.memory_limit import LimitedServer, limited_server
from traffic.mp4_files import add, box, make_frames, table, video

LIMIT = 2 * 10**9
VIDEO = "hunyuan-video"
TABLES = "moov/trak/mdia/minf/stbl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the server's weights, log and temporary files."""
    return tmp_path_factory.mktemp("limited")


@pytest.fixture(scope="module")
def server(folder: Path, checkpoint: Callable[[str], Path]) -> Iterator[LimitedServer]:
    """Run a server of an image model, at the root, and of a video model."""
    (folder / "tiny").symlink_to(ROOT / "models" / "tiny")
    (folder / VIDEO).symlink_to(checkpoint(VIDEO))
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    folders = {"HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    arguments = ("--model", f"tiny,{VIDEO}", "--weights", str(folder))
    with limited_server(LIMIT, *arguments, log=folder / "log", **folders) as running:
        running.files = sorted(folder.rglob("*"))
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


def many_boxes(count: int) -> bytes:
    return box("ftyp", b"isom\0\0\0\0") + box("free") * count


def nested_boxes(depth: int) -> bytes:
    boxes = (struct.pack(">I4s", 8 * (depth - level), b"moov") for level in range(depth))
    return box("ftyp", b"isom\0\0\0\0") + b"".join(boxes)


def fragmented() -> bytes:
    return video(make_frames(9), flags="frag_keyframe+empty_moov+default_base_moof")


CRAFTED: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "edits of many samples": (
        lambda: mp4_files.with_edits(mp4_files.with_samples(video(make_frames(2)), 90_000), *[(3_750_000, 0)] * 3000),
        413,
        "the video track has 3000 edits of 90000 samples; at most 11 edits of so many; export the edited video",
    ),
    "samples of one size": (
        lambda: mp4_files.with_samples(video(make_frames(2)), 4_000_000_000),
        413,
        "the video track has 4000000000 samples; at most 100000 are read, and at most 257 frames (VAE_MAX_FRAMES)",
    ),
    "samples of a fragment": (
        lambda: mp4_files.with_fragment(fragmented(), 60_000_000),
        413,
        "the video track has 60000009 samples; at most 100000 are read, and at most 257 frames (VAE_MAX_FRAMES)",
    ),
    "samples of many fragments": (
        lambda: fragmented() + 20 * mp4_files.with_fragment(b"", 9_000_000),
        413,
        "the video track has 180000009 samples",
    ),
    "composition times": (
        lambda: add(video(make_frames(2)), TABLES, table("ctts", 200_000_000)),
        413,
        "the video track has 200000000 entries in its `ctts` table; at most 100000",
    ),
    "a compressed header": (lambda: mp4_files.compressed_header(300_000_000), 400, "the file has no video"),
    "boxes beside each other": (lambda: many_boxes(200_000), 400, "the MP4 file has more than 100000 boxes"),
    "boxes in each other": (lambda: nested_boxes(2000), 400, "the file has no video"),
    "a frame that is shown in part": (
        lambda: mp4_files.cropped(video(np.full((4, 2048, 2048, 3), 128, np.uint8), preset="ultrafast"), 64, 64),
        400,
        "the video cannot be read (its frames have 2048x2048 pixels, but show only 64x64)",
    ),
}
"""Makers of files that declare more than they contain, with the status and the error of each."""


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[[str], Path]) -> torch.Tensor:
    """Return the latents of `video(make_frames(9))`."""
    vae = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(checkpoint(VIDEO)).eval()
    with av.open(io.BytesIO(video(make_frames(9)))) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    with torch.no_grad():
        return vae.encode(VideoProcessor(vae_scale_factor=8).preprocess_video(frames)).latent_dist.mode()


@pytest.mark.slow
@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_video_is_refused_and_the_next_request_succeeds(
    server: LimitedServer, expected: torch.Tensor, name: str
) -> None:
    make, status, message = CRAFTED[name]
    file = make()
    server.reset_peak()
    before, start = server.resident, time.monotonic()
    response = requests.post(f"{server.url}/{VIDEO}/encode", data=file, timeout=60)
    assert time.monotonic() - start < 10
    assert response.status_code == status, response.text
    assert message in response.json()["error"]
    assert server.is_alive
    assert server.peak - before < 200e6
    assert server.peak <= server.limit
    encoded = as_tensor(requests.post(f"{server.url}/{VIDEO}/encode", data=video(make_frames(9)), timeout=60))
    torch.testing.assert_close(encoded, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_service_writes_no_files(server: LimitedServer, folder: Path) -> None:
    """Test responses of each kind, after the requests of the other tests."""
    for model, shape, kinds in (
        ("tiny", (1, 8, 8, 8), ("image/png", "image/jpeg", "image/webp", "application/zip", "tensor/binary")),
        (VIDEO, (1, 16, 2, 2, 2), ("video/mp4",)),
    ):
        for accept in kinds:
            parameters = {"shape": list(shape), "dtype": "float32"}
            body, headers = bytes(4 * math.prod(shape)), {"Accept": accept}
            url = f"{server.url}/{model}/decode"
            response = requests.post(url, data=body, params=parameters, headers=headers, timeout=60)
            assert (response.status_code, response.headers["Content-Type"]) == (200, accept)
    assert sorted(folder.rglob("*")) == server.files
