"""Tests of videos that are sent while they are decoded, with faults.

Those of the connection run alone and in the Inference Toolkit, the others alone.
"""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import av
import numpy as np
import pytest
import requests
import torch

from handlers.serving.errors import RequestError
from handlers.serving.media.output import Mp4Writer, tensor_bytes
from handlers.serving.media.stream import BOUND, Stream
from tests.serving.test_limits import metric, wait_for_metric
from tests.support.endpoint import SERVERS, Endpoint, faulty_endpoint
from tests.support.faulty_server import (
    BUG,
    CHUNK_BUG,
    CHUNK_LOSES_DEVICE,
    CHUNK_NOT_FINITE,
    CHUNK_OUT_OF_MEMORY,
    CHUNK_SLOW,
    NEVER_ENOUGH,
    NOISE,
    NOT_FINITE,
    OUT_OF_MEMORY,
    PAYLOAD_BUG,
    SLOW,
)

TIMEOUT = 4
DEVICE_SECONDS = 0.5
IN_FLIGHT_MB = 14
ALONE = pytest.mark.parametrize("faulty", ["standalone"], indirect=True)
"""Mark of tests that run without the toolkit, because no code of theirs depends on it."""


class Broken(Exception):
    """The connection ended before the end of the response."""


@pytest.fixture(scope="module", params=SERVERS)
def faulty(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    """Return an endpoint with faults on request and a short deadline."""
    log = tmp_path_factory.mktemp("faulty") / "log"
    with run_faulty(request.param, checkpoint("hunyuan-video"), log) as endpoint:
        yield endpoint


@contextmanager
def run_faulty(kind: str, weights: Path, log: Path) -> Iterator[Endpoint]:
    environment = {"VAE_TIMEOUT": TIMEOUT, "DEVICE_SECONDS": DEVICE_SECONDS, "VAE_MAX_IN_FLIGHT_MB": IN_FLIGHT_MB}
    texts = {name: str(value) for name, value in environment.items()}
    with faulty_endpoint(kind, "hunyuan-video", weights, log, **texts) as endpoint:
        while not is_complete(read(send_request(endpoint))):  # a first pass can miss the deadline on a busy computer
            pass
        yield endpoint


def send_request(endpoint: Endpoint, latents: torch.Tensor | None = None, **parameters: object) -> requests.Response:
    """Return a streamed response whose body is still to be read."""
    latents = small(endpoint) if latents is None else latents
    return requests.post(
        f"{endpoint.url}/decode",
        data=tensor_bytes(latents),
        params={"shape": list(latents.shape), "dtype": "float32", "stream": "true", **parameters},
        stream=True,
        timeout=30,
    )


def small(endpoint: Endpoint) -> torch.Tensor:
    """Return latents of 25 frames, which are decoded in two chunks."""
    return endpoint.latents(frames=7, height=32, width=48)


def read(response: requests.Response) -> bytes:
    """Return the whole body. Raise `Broken` if it is incomplete."""
    try:
        return response.content
    except requests.exceptions.ChunkedEncodingError:
        raise Broken from None


def read_frames(file: bytes) -> np.ndarray:
    with av.open(io.BytesIO(file)) as container:
        assert container.streams.video[0].start_time == 0
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def is_complete(file: bytes) -> bool:
    """Return whether a file has its last box."""
    return file[-12:-8] == b"mfro"


def logged(endpoint: Endpoint, request_id: str) -> dict[str, object]:
    """Return a request's line in the log."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for line in endpoint.log.read_text().splitlines():
            if f'"request_id": "{request_id}"' in line:
                return json.loads(line[line.index("{") :])
        time.sleep(0.02)
    raise AssertionError(f"{request_id} is not in the log")


def assert_well(endpoint: Endpoint) -> None:
    """Check that the next stream is complete, and that earlier streams left nothing behind."""
    response = send_request(endpoint, latents=endpoint.latents(frames=2, height=32, width=32))
    assert is_complete(read(response))
    wait_for_metric(endpoint, "vae_bytes_in_flight", 0)
    wait_for_metric(endpoint, "inf_batch_current_size", 0)


class TestResponse:
    def test_frames_equal_those_of_the_whole_file(self, faulty: Endpoint) -> None:
        response = send_request(faulty, fps=10)
        whole = faulty.post(small(faulty), fps=10).content
        streamed = read(response)
        assert np.array_equal(read_frames(streamed), read_frames(whole))
        assert len(read_frames(whole)) == 25
        assert is_complete(streamed)
        assert not is_complete(whole)
        assert response.headers["Content-Type"] == "video/mp4"
        assert response.headers["X-VAE-Mode"] == "full"
        stages = [stage.split(";")[0] for stage in response.headers["Server-Timing"].split(", ")]
        assert stages == ["payload", "queue", "first"]
        line = logged(faulty, response.headers["X-Request-Id"])
        assert {"payload_ms", "queue_ms", "first_ms", "stream_ms"} <= set(line)
        assert (line["status"], line["mode"], line["sent_bytes"]) == (200, "full", len(streamed))

    def test_the_first_frames_arrive_before_the_last_are_decoded(self, faulty: Endpoint) -> None:
        response = send_request(faulty, seed=CHUNK_SLOW)
        chunks = response.iter_content(None)
        first, sent_at = next(chunks), time.monotonic()
        while not len(frames_so_far := playable(first)):
            first += next(chunks)
        assert metric(faulty, "inf_batch_current_size") == 1
        remaining = b"".join(chunks)
        assert time.monotonic() - sent_at > DEVICE_SECONDS / 2  # the device waits a fixed time
        assert np.array_equal(read_frames(first + remaining)[: len(frames_so_far)], frames_so_far)

    @ALONE
    @pytest.mark.parametrize("frames", [1, 2])
    def test_a_short_video_arrives_at_once(self, faulty: Endpoint, frames: int) -> None:
        response = send_request(faulty, latents=faulty.latents(frames=frames, height=32, width=32))
        assert response.status_code == 200, response.text
        streamed = read(response)
        assert len(read_frames(streamed)) == {1: 1, 2: 5}[frames]
        assert is_complete(streamed)


def playable(file: bytes) -> np.ndarray:
    """Return the frames of an incomplete file."""
    frames = []
    try:
        with av.open(io.BytesIO(file)) as container:
            for frame in container.decode(video=0):
                frames.append(frame.to_ndarray(format="rgb24"))
    except av.FFmpegError:
        pass
    return np.array(frames)


@ALONE
class TestRefused:
    """Tests of errors before the first byte: they have a status and JSON, as without `stream`."""

    @pytest.mark.parametrize(
        "parameters",
        [{"output_type": "pt"}, {"output_type": "pil"}],
    )
    def test_other_output_kinds_cannot_be_streamed(self, faulty: Endpoint, parameters: dict[str, str]) -> None:
        response = send_request(faulty, **parameters)
        assert response.status_code == 422
        assert response.json()["error"].startswith("`stream`: only the MP4 file of a decoded video is streamed")

    def test_json_and_encoding(self, faulty: Endpoint) -> None:
        latents = small(faulty)
        inside = faulty.post(latents, "/decode", {"Accept": "application/json"}, stream="true")
        pixels = torch.zeros(1, 3, 1, 32, 32)
        encoded = faulty.post(pixels, "/encode", stream="true")
        strange = faulty.post(latents, "/decode", stream="perhaps")
        assert [response.status_code for response in (inside, encoded, strange)] == [422, 422, 400]
        assert strange.json()["error"].startswith("`stream`: Input should be a valid boolean")

    def test_a_request_over_the_limit_in_flight(self, faulty: Endpoint) -> None:
        large = faulty.latents(frames=31, height=192, width=192)  # 121 frames: 13.4 MB, and their encoded size
        assert faulty.post(large[:, :, :1], stream="true").ok
        refused = faulty.post(large, stream="true")
        assert refused.status_code == 413
        assert f"at most {IN_FLIGHT_MB}, the limit here (VAE_MAX_IN_FLIGHT_MB)" in refused.json()["error"]
        assert_well(faulty)

    @pytest.mark.parametrize(
        ("fault", "status"), [(PAYLOAD_BUG, 500), (BUG, 500), (NEVER_ENOUGH, 503), (NOT_FINITE, 422)]
    )
    def test_a_failure_before_the_first_byte(self, faulty: Endpoint, fault: int, status: int) -> None:
        response = send_request(faulty, seed=fault)
        assert (response.status_code, next(iter(response.json()))) == (status, "error")
        assert_well(faulty)

    def test_a_request_that_waits_past_the_deadline(self, faulty: Endpoint) -> None:
        wait_for_metric(faulty, "inf_batch_current_size", 0)
        responses = [Future() for _ in range(10)]
        for future in responses:
            threading.Thread(target=lambda f: f.set_result(send_request(faulty, seed=SLOW)), args=(future,)).start()
        statuses = [future.result().status_code for future in responses]
        assert set(statuses) == {200, 504}
        for future in responses:
            future.result().close()
        assert_well(faulty)


class TestBroken:
    """Tests of errors after the first byte: the connection ends without the last chunk, and the file without its last
    box.
    """

    @pytest.mark.parametrize(
        ("faulty", "fault", "logs"),
        [
            ("standalone", CHUNK_BUG, "a secret"),
            ("standalone", CHUNK_OUT_OF_MEMORY, "CUDA out of memory. Tried to allocate 2.00 GiB."),
            ("standalone", CHUNK_NOT_FINITE, "FloatingPointError"),
            ("toolkit", CHUNK_BUG, "a secret"),
        ],
        indirect=["faulty"],
        scope="module",
    )
    def test_a_failure_midway(self, faulty: Endpoint, fault: int, logs: str) -> None:
        before = metric(faulty, "vae_broken_streams_total")
        response = send_request(faulty, seed=fault)
        assert response.status_code == 200
        received = []
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            received.extend(response.iter_content(None))
        received = b"".join(received)
        assert 0 < len(playable(received)) < 25
        assert not is_complete(received)
        line = logged(faulty, response.headers["X-Request-Id"])
        assert (line["status"], line["error"]) == (200, f"the stream broke: {logs}")
        assert metric(faulty, "vae_broken_streams_total") == before + 1
        assert_well(faulty)

    @ALONE
    def test_out_of_memory_before_the_first_byte_is_tried_in_the_next_mode(self, faulty: Endpoint) -> None:
        response = send_request(faulty, seed=OUT_OF_MEMORY)
        assert response.headers["X-VAE-Mode"] == "tiled"
        assert is_complete(read(response))

    def test_a_disconnected_reader_ends_the_work(self, faulty: Endpoint) -> None:
        before = metric(faulty, "vae_broken_streams_total")
        stopped = metric(faulty, "vae_stopped_passes_total")
        response = send_request(faulty, latents=faulty.latents(frames=31, height=32, width=48), seed=CHUNK_SLOW)
        next(response.iter_content(100))
        response.close()
        assert logged(faulty, response.headers["X-Request-Id"])
        assert_well(faulty)
        assert metric(faulty, "vae_broken_streams_total") == before
        assert metric(faulty, "vae_stopped_passes_total") == stopped + 1

    @ALONE
    def test_a_stalled_reader_is_disconnected_at_the_deadline(self, faulty: Endpoint) -> None:
        latents = small(faulty)
        lines = [
            f"POST /decode?shape=1,16,7,4,6&dtype=float32&stream=true&seed={NOISE} HTTP/1.1",
            "Host: localhost",
            f"Content-Length: {latents.nbytes}",
            "X-Request-Id: stalls",
        ]
        head = "\r\n".join([*lines, "", ""])
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the smallest buffer that the kernel allows
            reader.connect(("127.0.0.1", urlsplit(faulty.url).port))
            reader.sendall(head.encode() + tensor_bytes(latents))
            assert reader.recv(12) == b"HTTP/1.1 200"
            assert metric(faulty, "vae_bytes_in_flight") > latents.nbytes
            wait_for_metric(faulty, "inf_batch_current_size", 0)  # the device does not wait for the reader
            line = logged(faulty, "stalls")
            assert line["error"] == f"the stream broke: no response within {TIMEOUT} s (VAE_TIMEOUT); send less at once"
        assert_well(faulty)


class TestStream:
    def test_a_writer_waits_for_its_reader_at_the_bound(self) -> None:
        begun = threading.Event()
        stream = Stream(begun.set)
        first = stream.read()
        assert not begun.is_set()
        stream.write(b"1")
        assert begun.is_set()
        assert first.result(10) == b"1"
        stream.write(bytes(BOUND))
        waiting = threading.Thread(target=stream.write, args=(b"2",))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        assert len(stream.read().result(10)) == BOUND
        waiting.join(10)
        stream.end()
        assert [stream.read().result(10) for _ in range(3)] == [b"2", b"", b""]

    def test_bytes_before_a_failure_are_read_first(self) -> None:
        stream = Stream(lambda: None)
        stream.write(b"1")
        stream.fail(ValueError("first"))
        stream.fail(KeyError("second"))
        assert stream.read().result(10) == b"1"
        with pytest.raises(ValueError, match="first"):
            stream.read().result(10)
        with pytest.raises(ValueError, match="first"):
            stream.write(b"2")

    def test_a_stream_that_failed_before_its_start_never_starts(self) -> None:
        stream = Stream(lambda: pytest.fail("it has begun"))
        stream.fail(ValueError("no"))
        with pytest.raises(ValueError, match="no"):
            stream.write(b"1")

    def test_a_disconnected_reader_wakes_the_writer(self) -> None:
        stream = Stream(lambda: None)
        stream.write(bytes(BOUND))
        error: Future[None] = Future()

        def write() -> None:
            try:
                stream.write(b"2")
            except RequestError as raised:
                error.set_exception(raised)

        threading.Thread(target=write).start()
        stream.close()
        with pytest.raises(RequestError, match="nobody reads this stream any more"):
            error.result(10)

    @pytest.mark.slow
    def test_a_slow_reader_blocks_only_the_encoder(self) -> None:
        begun = threading.Event()
        stream, noise = Stream(begun.set), np.random.default_rng(0)
        count = 60
        with Mp4Writer(24, stream) as writer:
            for _ in range(count):
                writer.add(noise.integers(0, 256, (1, 256, 256, 3), np.uint8))
        assert begun.wait(20)
        file = b""
        while chunk := stream.read().result(20):
            assert len(chunk) < BOUND + 400_000  # plus one frame
            file += chunk
            time.sleep(0.01)
        assert len(file) > 2 * BOUND
        assert len(read_frames(file)) == count


def test_when_the_device_is_lost_midway_the_stream_breaks(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Test a lost device, in an endpoint of its own, because it is then unusable."""
    with run_faulty("standalone", checkpoint("hunyuan-video"), tmp_path / "log") as faulty:
        response = send_request(faulty, seed=CHUNK_LOSES_DEVICE)
        assert response.status_code == 200
        with pytest.raises(Broken):
            read(response)
        wait_for_metric(faulty, "inf_batch_current_size", 0)
        assert requests.get(f"{faulty.url}/health", timeout=5).status_code == 503
        assert send_request(faulty).status_code == 503
