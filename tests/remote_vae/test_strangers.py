"""Tests of servers of other projects, and hostile ones: each of their responses becomes one clear error."""

from __future__ import annotations

import gzip
import io
import json
import logging
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tenacity import Retrying

from remote_vae import Client, RemoteVAE, RemoteVAEError, files, tensors
from scripts.local_server import ROOT
from tests.support import forked, sleeping_service
from tests.support.checkpoints import KL

LATENTS = torch.zeros(1, 4, 8, 8)
PIXELS = torch.zeros(1, 3, 64, 64)
CONFIG: dict[str, Any] = {**sleeping_service.CONFIG, "vae_config": KL}
PAGE = b"<!doctype html><title>Sign in</title><form>\x1b]0;owned\x07</form>"
GZIPPED = gzip.compress(bytes(20_000_000), 1)

Response = tuple[dict[str, str], bytes]


class Stranger(ThreadingHTTPServer):
    """Server with a response, headers and body, for each path. An endless body repeats its last byte."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.responses: dict[str, Response] = {"/config": ({}, json.dumps(CONFIG).encode())}
        self.status = 200
        self.sent = 0
        """Bytes of all bodies."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have disconnected."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stranger

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers, body = self.server.responses.get(self.path.partition("?")[0], ({}, PAGE))
        self.send_response(self.server.status)
        for name, value in ({} if "Content-Length" in headers else {"Connection": "close"}).items() | headers.items():
            if name != "Endless":
                self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        self.wfile.write(body)
        self.server.sent += len(body)
        while "Endless" in headers:
            self.wfile.write(body[-1:] * 65536)
            self.server.sent += 65536

    do_POST = do_GET


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    with Stranger() as stranger:
        threading.Thread(target=stranger.serve_forever, args=(0.01,), daemon=True).start()
        yield stranger
        stranger.shutdown()


def config(**changes: Any) -> Response:
    return {}, json.dumps({**CONFIG, **changes}).encode()


CONFIGS: dict[str, Response] = {
    "a page to sign in": ({"Content-Type": "text/html"}, PAGE),
    "nothing": ({}, b""),
    "a list": ({}, b"[]"),
    "an empty object": ({}, b"{}"),
    "null": ({}, b"null"),
    "not UTF-8": ({}, b'{"version": "\xff\xfe"}'),
    "nested without an end": ({}, b"[" * 1_000_000),
    "a number of 100,000 digits": ({}, b'{"version": ' + b"9" * 100_000 + b"}"),
    "gzip of much": ({"Content-Encoding": "gzip"}, GZIPPED),
    "without an end": ({"Endless": ""}, b"["),
    "a body that breaks off": ({"Content-Length": "1000"}, b"{"),
    "a config that is a string": config(vae_config="stranger/model"),
    "no layout": config(latents={"channels": 4}),
    "channels in words": config(latents={**CONFIG["latents"], "channels": "four"}),
    "a factor of 0": config(latents={**CONFIG["latents"], "vae_scale_factor": 0}),
    "limits of no number": config(limits={**CONFIG["limits"], "max_batch": None}),
    "another dtype": config(dtype="load"),
    "frames that run backwards": config(pixels={**CONFIG["pixels"], "frame_counts": [9, 5, 1]}),
    "statistics of text": config(pixels={**CONFIG["pixels"], "statistics": [["a"] * 3, ["b"] * 3]}),
    "a million layers": config(vae_config={**KL, "layers_per_block": 1_000_000}),
    "a block of no class": config(vae_config={**KL, "down_block_types": ["os.system"] * 4}),
    "buffers that are not even": config(vae_class="AutoencoderKLFlux2", buffers={"bn.running_mean": [[1], [2, 3]]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_foreign_config(stranger: Stranger, name: str) -> None:
    stranger.responses["/config"] = CONFIGS[name]
    with pytest.raises(RemoteVAEError) as caught:
        RemoteVAE(stranger.url, retry_timeout=2)
    assert is_one_clear_line(caught.value)
    assert stranger.sent < 50_000_000


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "AutoencoderRAE", "utils", "vae", "os.system", "\x1b[2J"])
def test_a_class_that_is_not_an_autoencoder(stranger: Stranger, name: str) -> None:
    """Test AutoencoderRAE, which would load the model in its config from the Hub."""
    stranger.responses["/config"] = config(vae_class=name, vae_config={"encoder_name_or_path": "stranger/model"})
    with pytest.raises(ImportError, match="has no autoencoder for images or videos named") as caught:
        RemoteVAE(stranger.url)
    assert str(caught.value).isprintable()


def tensor(shape: Any, dtype: str = "float32", size: int = 3 * 64 * 64 * 4, **headers: str) -> Response:
    return {"shape": json.dumps(shape), "dtype": dtype, **headers}, bytes(size)


DECODED: dict[str, Response] = {
    "a page to sign in": ({"Content-Type": "text/html"}, PAGE),
    "JSON": ({"Content-Type": "application/json"}, b"{}"),
    "nothing": ({}, b""),
    "an image": ({"Content-Type": "image/png"}, b"\x89PNG\r\n\x1a\n"),
    "no dtype": ({"shape": "[1, 3, 64, 64]"}, bytes(3 * 64 * 64 * 4)),
    "another dtype": tensor([1, 3, 64, 64], "float64", 3 * 64 * 64 * 8),
    "an attribute of torch": tensor([1, 3, 64, 64], "load"),
    "too short": tensor([1, 3, 64, 64], size=100),
    "too long": tensor([1, 3, 64, 64], size=3 * 64 * 64 * 4 + 1),
    "broken off": tensor([1, 3, 64, 64], size=100, **{"Content-Length": "49152"}),
    "of another size": tensor([1, 3, 32, 128]),
    "of another rank": tensor([3, 64, 64]),
    "of another batch": tensor([2, 3, 64, 32]),
    "of no size": tensor([0, 3, 64, 64], size=0),
    "of negative sizes": tensor([-1, -3, 64, 64]),
    "of a shape in words": tensor("1, 3, 64, 64"),
    "of a nested shape": ({"shape": "[" * 10_000, "dtype": "float32"}, b""),
    "of sizes that are booleans": tensor([True, 3, 64, 64]),
    "without an end": ({**tensor([1, 3, 64, 64])[0], "Endless": ""}, bytes(1)),
    "gzip of much": ({**tensor([1, 3, 64, 64])[0], "Content-Encoding": "gzip"}, GZIPPED),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODED)
def test_a_foreign_tensor(stranger: Stranger, name: str) -> None:
    vae = RemoteVAE(stranger.url, retry_timeout=2)
    stranger.responses["/decode"] = stranger.responses["/encode"] = DECODED[name]
    for call in (lambda: vae.decode(LATENTS), lambda: vae.encode(PIXELS)):
        with pytest.raises(RemoteVAEError) as caught:
            call()
        assert is_one_clear_line(caught.value)
    assert stranger.sent < 50_000_000


def zipped(*entries: bytes) -> Response:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for index, entry in enumerate(entries):
            archive.writestr(f"../{index}.png", entry)
    return {"Content-Type": "application/zip"}, buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (({}, PAGE), "is not a zip file"),
        (zipped(), "it has 0 entries for a batch of 1"),
        (zipped(png(), png()), "it has 2 entries for a batch of 1"),
        (zipped(bytes(200_000_000)), "its entries are larger than any decoded image"),
        (zipped(PAGE), "cannot identify image file"),
        (({}, zipped(png())[1][:50] + bytes(9) + zipped(png())[1][59:]), "is no ZIP of the decoded images"),
    ],
    ids=["a page", "empty", "two images", "a bomb", "a page inside", "damaged"],
)
def test_foreign_images(stranger: Stranger, tmp_path: Path, response: Response, reason: str) -> None:
    stranger.responses["/decode"] = response
    np.save(tmp_path / "z.npy", LATENTS.numpy())
    with pytest.raises(RemoteVAEError, match=reason) as caught:
        files.decode(Client(stranger.url, retry_timeout=2), tmp_path / "z.npy", tmp_path / "out.png", {})
    assert is_one_clear_line(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["z.npy"]


def test_a_foreign_video(stranger: Stranger) -> None:
    client = Client(stranger.url, retry_timeout=2)
    for call in (tensors.decode_mp4, lambda *arguments: list(tensors.stream_mp4(*arguments))):
        with pytest.raises(RemoteVAEError, match="the response is no MP4") as caught:
            call(client, torch.zeros(1, 16, 3, 8, 8))
        assert is_one_clear_line(caught.value)
    stranger.responses["/decode"] = ({"Endless": ""}, b"\0\0\0\x18ftyp")
    with pytest.raises(RemoteVAEError, match="the response is too long: expected at most"):
        list(tensors.stream_mp4(client, torch.zeros(1, 16, 3, 8, 8)))


def test_a_redirect_is_not_followed(stranger: Stranger) -> None:
    stranger.status = 302
    stranger.responses["/config"] = ({"Location": "https://example.org/\x1b[2Jlogin"}, PAGE)
    with pytest.raises(
        RemoteVAEError, match=r"302 it redirects to https://example\.org/\\x1b\[2Jlogin, which"
    ) as caught:
        RemoteVAE(stranger.url, token="hf_theTokenThatNobodyMaySee")
    assert is_one_clear_line(caught.value)


def test_an_error_is_printed_without_control_characters(stranger: Stranger) -> None:
    stranger.status = 422
    stranger.responses["/config"] = ({}, b'{"error": "\\u001b[2J\\u202egnp.exe\\u0000 \\u009b31m"}')
    with pytest.raises(RemoteVAEError) as caught:
        RemoteVAE(stranger.url)
    assert str(caught.value).endswith(r"/config: 422 \x1b[2J\u202egnp.exe\x00 \x9b31m")
    stranger.responses["/config"] = ({"Endless": ""}, b"x")
    with pytest.raises(RemoteVAEError, match=r"422 x{300}$"):
        RemoteVAE(stranger.url)


@pytest.mark.slow
@pytest.mark.parametrize("retry_after", ["3600", "1e400", "nan", "-1", "Wed, 21 Oct 2065 07:28:00 GMT", "9" * 400])
def test_no_server_makes_a_client_wait_beyond_its_retry_timeout(
    stranger: Stranger, retry_after: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    stranger.status = 503
    stranger.responses["/config"] = ({"Retry-After": retry_after}, b'{"error": "full"}')
    start = time.monotonic()
    with pytest.raises(RemoteVAEError, match="503 full"):
        RemoteVAE(stranger.url, retry_timeout=1)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(("retry_after", "seconds"), [("3600", 60), ("7", 7)])
def test_no_server_makes_a_client_wait_longer_than_a_minute_at_a_time(
    stranger: Stranger, retry_after: str, seconds: float
) -> None:
    stranger.status = 503
    stranger.responses["/config"] = ({"Retry-After": retry_after}, b'{"error": "full"}')
    client, waits = Client(stranger.url), []

    def send() -> None:
        for attempt in client.attempts(Retrying, sleep=waits.append, is_cancelled=lambda: len(waits) == 2):
            with attempt:
                client.send("GET", "/config")

    with pytest.raises(RemoteVAEError, match="503 full"):
        send()
    assert waits == [seconds] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    ["info URL", "check URL", "decode URL z.npy o.png", "decode URL z.npy o.mp4", "encode URL p.png --out o.npy"],
)
def test_the_command_ends_in_one_line(stranger: Stranger, tmp_path: Path, command: str) -> None:
    stranger.responses["/config"] = ({"Content-Type": "text/html"}, PAGE)
    np.save(tmp_path / "z.npy", LATENTS.numpy())
    (tmp_path / "p.png").write_bytes(png())
    arguments = command.replace("URL", stranger.url).split()
    environment = {"COLUMNS": "300", "PYTHONPATH": str(ROOT)}
    status, out, errors = forked.run("-m", "remote_vae", *arguments, folder=tmp_path, **environment)
    assert (status, out) == (1, "")
    assert len(errors.splitlines()) == 1, errors
    assert re.match("error: .*this project\\?$", errors.strip())
    assert "\x1b]0;" not in errors


def is_one_clear_line(error: RemoteVAEError) -> bool:
    return str(error).isprintable() and str(error).startswith(("http://127.0.0.1:", "the ")) and len(str(error)) < 600
