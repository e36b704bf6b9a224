"""Tests of limits: sizes, formats, tokens, and concurrent requests.

Those of connections and tokens run alone and in the Inference Toolkit, the others alone.
"""

import http.client
import io
import json
import re
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import BinaryIO
from urllib.parse import urlsplit

import pytest
import requests
import torch
from PIL import Image

from handlers.serving.limits import Limits
from tests.support.endpoint import SERVERS, Endpoint, faulty_endpoint
from tests.support.faulty_server import SLOW

TOKEN = "a-token-of-this-test"
ALONE = pytest.mark.parametrize("narrow", ["standalone"], indirect=True)
"""Mark of tests that run without the toolkit, because no code of theirs depends on it."""


@pytest.fixture(scope="module", params=SERVERS)
def narrow(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    """Return an endpoint with small limits and a queue of 16 requests."""
    limits = {
        "MAX_BODY_MB": 1,
        "MAX_QUEUE": 16,
        "QUEUE_TIMEOUT": 0.5,
        "MAX_PIXELS": 300_000,
        "MAX_BATCH": 4,
        "MAX_IN_FLIGHT_MB": 1.5,
    }
    environment = {f"VAE_{name}": str(value) for name, value in limits.items()} | {"DEVICE_SECONDS": "0.2"}
    log = tmp_path_factory.mktemp("narrow") / "log"
    with faulty_endpoint(request.param, "sd-v1", checkpoint("sd-v1"), log, **environment) as endpoint:
        endpoint.server = request.param
        yield endpoint


@pytest.fixture(scope="module", params=SERVERS)
def guarded(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    """Return an endpoint that requires a token."""
    log = tmp_path_factory.mktemp("guarded") / "log"
    with faulty_endpoint(request.param, "sd-v1", checkpoint("sd-v1"), log, API_TOKEN=TOKEN) as endpoint:
        yield endpoint


def slow(endpoint: Endpoint) -> requests.Response:
    return endpoint.post(endpoint.latents(), seed=SLOW)


def open_connection(endpoint: Endpoint) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=20)


def metric(endpoint: Endpoint, name: str) -> float:
    text = requests.get(f"{endpoint.url}/metrics", timeout=5).text
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


def wait_for_metric(endpoint: Endpoint, name: str, value: float) -> None:
    deadline = time.monotonic() + 20
    while metric(endpoint, name) != value:
        assert time.monotonic() < deadline, f"{name} is {metric(endpoint, name)}"
        time.sleep(0.005)


def read_response(stream: BinaryIO) -> tuple[int, bytes]:
    """Return status and body of the next response on a connection. An error must be JSON."""
    status = int(stream.readline().split()[1])
    headers = http.client.parse_headers(stream)
    body = stream.read(int(headers["Content-Length"]))
    assert status == 200 or list(json.loads(body)) == ["error"]
    return status, body


def test_bytes_in_flight_default_to_an_eighth_of_the_memory() -> None:
    assert Limits().within(2 * 10**9).max_in_flight_mb == 250
    assert Limits().within(10**12).max_in_flight_mb == 2048
    assert Limits(max_in_flight_mb=2048).within(2 * 10**9).max_in_flight_mb == 2048


class TestSizes:
    def test_a_body_over_the_limit_is_413_with_or_without_a_length(self, narrow: Endpoint) -> None:
        body = b"\0" * 1_500_000
        for data in (body, iter([body[:700_000], body[700_000:]])):
            response = requests.post(narrow.url, data=data, timeout=10)
            assert response.status_code == 413
            assert response.json() == {"error": "the body is larger than 1 MB, the limit here (VAE_MAX_BODY_MB)"}
        assert narrow.post(narrow.latents()).ok

    @ALONE
    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            (torch.zeros(1, 4, 64, 80), r"\[1, 4, 64, 80\] is 327680 pixels; at most 300000 .*\(VAE_MAX_PIXELS\)"),
            (torch.zeros(3, 4, 40, 40), r"\[3, 4, 40, 40\] is 307200 pixels; at most 300000 .*\(VAE_MAX_PIXELS\)"),
            (torch.zeros(5, 4, 1, 1), r"a batch of 5; at most 4, the limit here \(VAE_MAX_BATCH\)"),
            (torch.zeros(1, 3, 512, 640, dtype=torch.uint8), "327680 pixels; at most 300000"),
        ],
    )
    def test_a_tensor_with_too_many_pixels(self, narrow: Endpoint, tensor: torch.Tensor, message: str) -> None:
        response = narrow.post(tensor, output_type="pt")
        assert response.status_code == 413
        assert re.search(message, response.json()["error"]), response.json()

    @ALONE
    @pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
    def test_an_image_with_too_many_pixels_is_not_decoded(self, narrow: Endpoint, image_format: str) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (640, 512)).save(buffer, format=image_format)
        response = requests.post(narrow.url, data=buffer.getvalue(), timeout=10)
        message = "640x512 pixels; at most 300000 in one request, the limit here (VAE_MAX_PIXELS)"
        assert (response.status_code, response.json()) == (413, {"error": message})

    @ALONE
    def test_a_decompression_bomb_takes_no_memory(self, narrow: Endpoint) -> None:
        before = metric(narrow, "process_resident_memory_bytes")
        response = requests.post(narrow.url, data=png_bomb(30_000), timeout=10)
        assert response.status_code == 413
        assert response.json()["error"].startswith("30000x30000 pixels; at most 300000")
        assert metric(narrow, "process_resident_memory_bytes") - before < 100e6  # decoded it takes 2.7 GB

    @ALONE
    def test_the_decoded_size_of_a_body_counts_too(self, narrow: Endpoint) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (512, 512)).save(buffer, format="PNG")  # 3 MB as floats
        response = requests.post(narrow.url, data=buffer.getvalue(), timeout=10)
        message = "the request takes 3 MB; at most 1.5, the limit here (VAE_MAX_IN_FLIGHT_MB)"
        assert (response.status_code, response.json()["error"]) == (413, message)
        assert metric(narrow, "vae_bytes_in_flight") == 0

    def test_incoming_bodies_count_together(self, narrow: Endpoint) -> None:
        halves = [open_connection(narrow) for _ in range(2)]
        for connection in halves:
            connection.putrequest("POST", "/")
            connection.putheader("Content-Length", "1000000")
            connection.endheaders(b"\0" * 700_000)
        wait_for_metric(narrow, "vae_bytes_in_flight", 1_400_000)
        response = requests.post(narrow.url, data=b"\0" * 200_000, timeout=10)
        assert response.status_code == 503
        message = "with this request more than 1.5 MB would be in flight (VAE_MAX_IN_FLIGHT_MB); try again soon"
        assert (response.json(), response.headers["Retry-After"]) == ({"error": message}, "1")
        for connection in halves:
            connection.close()
        wait_for_metric(narrow, "vae_bytes_in_flight", 0)
        assert narrow.post(narrow.latents()).ok


def png_bomb(side: int) -> bytes:
    """Return a PNG of side x side black pixels with only a few bytes of image data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (side * 3 + 1) * 10, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@ALONE
class TestValues:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 3, 64, 64)])
    def test_nan_and_infinity_are_refused(self, narrow: Endpoint, value: float, shape: tuple[int, ...]) -> None:
        tensor = torch.zeros(shape)
        tensor[0, 1, 2, 3] = value
        response = narrow.post(tensor)
        assert response.status_code == 422
        assert response.json()["error"].startswith("the tensor has NaN or infinity")

    def test_scaling_out_of_range(self, narrow: Endpoint) -> None:
        response = narrow.post(narrow.latents(), scaling_factor=1e-38, shift_factor=3e38)
        assert (response.status_code, response.json()["error"][:31]) == (422, "the tensor has NaN or infinity,")
        response = narrow.post(torch.zeros(1, 3, 64, 64), shift_factor=-3e38, scaling_factor=10)
        assert (response.status_code, response.json()["error"][:20]) == (422, "`scaling_factor`, `s")

    @pytest.mark.parametrize("content_type", ["text/html", "image/gif", "image/tiff", "video/webm", "multipart/mixed"])
    def test_another_content_type_is_415(self, narrow: Endpoint, content_type: str) -> None:
        response = narrow.post(narrow.latents(), headers={"Content-Type": content_type})
        assert response.status_code == 415
        assert response.json()["error"].startswith(
            f"Content-Type '{content_type}' is not supported; send none, or one of"
        )

    @pytest.mark.parametrize(("coding", "status"), [("gzip", 415), ("identity, br", 415), ("identity", 200), ("", 200)])
    def test_a_compressed_body_is_415(self, narrow: Endpoint, coding: str, status: int) -> None:
        response = narrow.post(narrow.latents(), headers={"Content-Encoding": coding})
        assert response.status_code == status
        if status == 415:
            name = coding.split()[-1]
            assert response.json()["error"].startswith(
                f"Content-Encoding '{name}' is not supported; send the body uncompressed"
            )

    @pytest.mark.parametrize(
        ("accept", "status", "content_type"),
        [
            ("image/jpeg;q=0, image/png", 200, "image/png"),
            ("image/*;q=0", 406, "application/json"),
            ("image/*;q=0, tensor/binary", 200, "tensor/binary"),
        ],
    )
    def test_accept(self, narrow: Endpoint, accept: str, status: int, content_type: str) -> None:
        response = narrow.post(narrow.latents(), headers={"Accept": accept})
        assert (response.status_code, response.headers["Content-Type"]) == (status, content_type)

    @pytest.mark.parametrize("content_type", ["application/octet-stream", "application/x-www-form-urlencoded", ""])
    def test_a_generic_content_type_is_accepted(self, narrow: Endpoint, content_type: str) -> None:
        assert narrow.post(narrow.latents(), headers={"Content-Type": content_type}).ok


class TestOddRequests:
    """Tests of requests that once got a response without JSON, or a 500. `make fuzz` found them."""

    @pytest.mark.parametrize(
        ("line", "status"), [("POST /decode//", 404), ("POST *", 404), ("PUT /health", 405), ("POST /%ff%00", 404)]
    )
    @pytest.mark.parametrize("host", ["localhost", "[", "[::1"])
    def test_target_and_host(self, narrow: Endpoint, line: str, status: int, host: str) -> None:
        foreign = narrow.server == "standalone" and host != "localhost"  # the server listens on a loopback address
        with socket.create_connection(("127.0.0.1", urlsplit(narrow.url).port), timeout=20) as connection:
            connection.sendall(f"{line} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            with connection.makefile("rb") as stream:
                assert read_response(stream)[0] == (403 if foreign else status)

    @ALONE
    def test_half_a_surrogate_pair(self, narrow: Endpoint) -> None:
        parameters = '{"shape": [1, 4, 16, 16], "dtype": "float32", "height": "\\ud800", "width": 64, "fps": "\\ud800"}'
        body = f'{{"inputs": "{"A" * 8}", "parameters": {parameters}}}'
        response = requests.post(narrow.url, data=body, headers={"Content-Type": "application/json"}, timeout=10)
        assert response.status_code == 400
        assert "got '\\ud800'" in response.json()["error"]


class TestConcurrency:
    @ALONE
    def test_a_full_queue_returns_503_and_loses_no_request(self, narrow: Endpoint) -> None:
        with ThreadPoolExecutor(30) as clients:
            responses = list(clients.map(lambda _: slow(narrow), range(30)))
        statuses = Counter(response.status_code for response in responses)
        assert set(statuses) == {200, 503}
        assert statuses[200] >= 16
        for response in responses:
            if response.status_code == 503:
                assert response.headers["Retry-After"] == "1"
                assert "no slot was free" in response.json()["error"]
        assert narrow.post(narrow.latents()).ok

    def test_a_disconnected_clients_work_is_dropped(self, narrow: Endpoint) -> None:
        with ThreadPoolExecutor(1) as client:
            busy = client.submit(slow, narrow)
            wait_for_metric(narrow, "inf_batch_current_size", 1)
            gone = open_connection(narrow)
            gone.request("POST", "/?shape=1&shape=4&shape=8&shape=8&dtype=float32", body=bytes(1024))
            wait_for_metric(narrow, "inf_queue_size", 1)
            gone.close()
            wait_for_metric(narrow, "inf_queue_size", 0)
            assert not busy.done()
            assert busy.result().ok
        assert "Traceback" not in narrow.log.read_text()

    @ALONE
    def test_two_hundred_connections_all_get_a_response(self, narrow: Endpoint) -> None:
        inputs = [narrow.latents(height=16, width=16, seed=seed) for seed in range(200)]

        def persist(latents: torch.Tensor) -> bytes:
            """Retry until the request is accepted."""
            while (response := narrow.post(latents, output_type="pt")).status_code == 503:
                time.sleep(int(response.headers["Retry-After"]))
            return response.content

        with ThreadPoolExecutor(200) as clients:
            responses = list(clients.map(persist, inputs))
        expected = narrow.decoded(torch.cat(inputs) * narrow.vae.config.scaling_factor)
        decoded = torch.frombuffer(bytearray(b"".join(responses)), dtype=torch.float32).view(expected.shape)
        torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)

    def test_pipelined_requests_get_responses_in_order(self, narrow: Endpoint) -> None:
        body = bytes(4 * 4 * 8 * 8)
        good = b"POST /?shape=1&shape=4&shape=8&shape=8&dtype=float32&output_type=pt HTTP/1.1\r\nHost: localhost\r\n"
        good += b"Content-Length: %d\r\n\r\n" % len(body) + body
        wrong = good.replace(b"float32", b"float64")
        # The server refuses this request before it reads the body.
        foreign = good.replace(b"Host: localhost", b"Host: localhost\r\nContent-Type: text/html")
        with socket.create_connection(("127.0.0.1", urlsplit(narrow.url).port), timeout=20) as connection:
            connection.sendall(good + wrong + foreign + good)
            with connection.makefile("rb") as stream:
                statuses = [read_response(stream)[0] for _ in range(4)]
        assert statuses == [200, 400, 415, 200]


class TestTinyChunks:
    def test_probes_succeed_while_four_clients_send_tiny_chunks(self, narrow: Endpoint) -> None:
        """Send bodies in chunks of one byte.

        A parser in Python takes a second for 43,000 of them, the most that asyncio reads at a time.
        """
        over = Event()

        def send() -> None:
            while not over.is_set():
                # The server refuses the body at 1 MB. The loop then starts a new one.
                with (
                    socket.create_connection(("127.0.0.1", urlsplit(narrow.url).port), 20) as connection,
                    suppress(OSError),
                ):
                    connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
                    while not over.is_set():
                        connection.sendall(b"1\r\nx\r\n" * 10_000)

        with ThreadPoolExecutor(4) as senders:
            sending = [senders.submit(send) for _ in range(4)]
            try:
                time.sleep(1)
                start = time.monotonic()
                for _ in range(4):
                    assert requests.get(f"{narrow.url}/health", timeout=20).ok
                assert time.monotonic() - start < 10
            finally:
                over.set()
            for future in sending:
                future.result()


class TestToken:
    def test_every_post_requires_the_token(self, guarded: Endpoint) -> None:
        for path in ("/", "/predict", "/decode", "/encode"):
            for header in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": f"Bearer {TOKEN[:-1]}"},
                {"Authorization": f"Bearer {TOKEN}s"},
                {"Authorization": TOKEN},
                {"Authorization": "Bearer "},
            ):
                response = guarded.post(guarded.latents(), path, headers=header)
                assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")
                assert "Authorization: Bearer <token>" in response.json()["error"]

    def test_a_request_with_the_token_succeeds(self, guarded: Endpoint) -> None:
        for scheme in ("Bearer", "bearer"):
            assert guarded.post(guarded.latents(), headers={"Authorization": f"{scheme} {TOKEN}"}).ok

    def test_health_and_metrics_require_no_token(self, guarded: Endpoint) -> None:
        for path in ("/", "/health"):
            assert requests.get(guarded.url + path, timeout=5).text == "Ok"
        assert requests.get(f"{guarded.url}/metrics", timeout=5).ok

    def test_the_token_is_never_logged(self, guarded: Endpoint) -> None:
        guarded.post(guarded.latents(), headers={"Authorization": f"Bearer {TOKEN}"})
        assert TOKEN not in guarded.log.read_text()
