"""Tests of faults at each stage: the client gets a response, and the service recovers or reports that it cannot.

Those of the start, the end, connections and the log run alone and in the Inference Toolkit, the others alone.
"""

import http.client
import json
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import requests

from handlers.serving.media.output import tensor_bytes
from scripts import local_server
from scripts.local_server import ROOT, clean_environment, free_port
from tests.serving.test_limits import metric, open_connection, wait_for_metric
from tests.support.endpoint import SERVERS, Endpoint, faulty_endpoint
from tests.support.faulty_server import (
    BUG,
    DEVICE_LOST,
    DISK_FULL,
    LOAD_WAITS,
    NEVER_ENOUGH,
    NOT_FINITE,
    OUT_OF_MEMORY,
    OUTPUT_HANGS,
    PAYLOAD_BUG,
    PAYLOAD_HANGS,
    SLOW,
    THREAD_ENDS,
)
from traffic.servers import listening

TIMEOUT, LONG_TIMEOUT = 2, 3
OPERATING = (ROOT / "docs" / "operating.md").read_text()
HEALTH = dict(
    re.findall(r"^\| (.*) \| (.*) \|$", OPERATING.partition("## Health")[2].partition("\n## ")[0], re.MULTILINE)
)
"""Responses of `GET /health` by state."""


@pytest.fixture(scope="module", params=SERVERS)
def faulty(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    """Return an endpoint with faults on request and a short deadline."""
    log = tmp_path_factory.mktemp("faulty") / "log"
    environment = {"VAE_TIMEOUT": str(TIMEOUT), "DEVICE_SECONDS": "1.5"}
    with faulty_endpoint(request.param, "sd-v1", checkpoint("sd-v1"), log, **environment) as endpoint:
        # A first pass sets up what later passes use, and can miss the deadline on a busy computer.
        while not send_request(endpoint).ok:
            pass
        yield endpoint


ALONE = pytest.mark.parametrize("faulty", ["standalone"], indirect=True)
START_ALONE = pytest.mark.parametrize("start", ["standalone"], indirect=True)
"""Marks of tests that run without the toolkit, because no code of theirs depends on it."""

Start = Callable[..., Endpoint]


@pytest.fixture(params=SERVERS)
def start(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts an endpoint for a test that may break it."""
    running = []

    def start(**environment: str) -> Endpoint:
        context = faulty_endpoint(request.param, "sd-v1", checkpoint("sd-v1"), tmp_path / "log", **environment)
        running.append(context)
        return context.__enter__()

    yield start
    for context in running:
        context.__exit__(None, None, None)


def send_request(endpoint: Endpoint, fault: int | None = None) -> requests.Response:
    return endpoint.post(endpoint.latents(), output_type="pt", **({} if fault is None else {"seed": fault}))


def health(endpoint: Endpoint) -> tuple[int, str]:
    response = requests.get(f"{endpoint.url}/health", timeout=5)
    return response.status_code, response.text


def read_health(url: str) -> str:
    """Return the response to a new connection to `/health`, in the guide's words."""
    try:
        return str(requests.get(f"{url}/health", timeout=5).status_code)
    except requests.ConnectionError as error:
        return "connection refused" if "Connection refused" in str(error) else "connection closed"


def poll_health(url: str, last: str) -> list[str]:
    """Return each new response of `/health` until it is `last`."""
    seen = [read_health(url)]
    deadline = time.monotonic() + 60
    while seen[-1] != last and time.monotonic() < deadline:
        if (now := read_health(url)) != seen[-1]:
            seen.append(now)
        time.sleep(0.02)
    return seen


@pytest.mark.parametrize("kind", SERVERS)
def test_the_port_is_closed_while_the_model_loads(kind: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    gate, log, port = tmp_path / "gate", tmp_path / "log", free_port()
    arguments = ("-m", "tests.support.faulty_server", kind, "--port", str(port), "--weights", str(checkpoint("sd-v1")))
    toolkit = {"TOOLKIT": os.environ["TOOLKIT"]} if "TOOLKIT" in os.environ else {}
    process = local_server.start_process(arguments, log, {**clean_environment(), **toolkit, "GATE": str(gate)})
    try:
        with ThreadPoolExecutor(1) as client:
            seen = client.submit(poll_health, f"http://127.0.0.1:{port}", last=HEALTH["requests are taken"])
            while LOAD_WAITS not in log.read_text() and not seen.done():
                time.sleep(0.02)
            time.sleep(1)  # time in which a listening server would respond
            ended_before_the_load = seen.done()
            gate.touch()
        assert not ended_before_the_load
        assert seen.result() == [HEALTH["the model loads"], HEALTH["requests are taken"]]
    finally:
        process.kill()
        process.wait(timeout=30)


class TestRecoverableFaults:
    """Tests of faults that fail one request: the next succeeds, and the service stays healthy."""

    @pytest.mark.parametrize(
        ("faulty", "fault"),
        [("standalone", PAYLOAD_BUG), ("standalone", BUG), ("standalone", DISK_FULL), ("toolkit", BUG)],
        indirect=["faulty"],
        scope="module",
    )
    def test_a_bug_is_500_with_a_request_id_and_no_details(self, faulty: Endpoint, fault: int) -> None:
        response = faulty.post(faulty.latents(), seed=fault, headers={"X-Request-Id": f"fault-{fault}"})
        message = "the service failed on this request; its log has the reason"
        assert (response.status_code, response.json()) == (500, {"error": message, "request_id": f"fault-{fault}"})
        assert f"request fault-{fault} failed" in faulty.log.read_text()
        self.assert_well(faulty)

    @ALONE
    @pytest.mark.parametrize("fault", [PAYLOAD_HANGS, OUTPUT_HANGS])
    def test_a_stage_that_hangs_is_504(self, faulty: Endpoint, fault: int) -> None:
        response = send_request(faulty, fault)
        message = f"no response within {TIMEOUT} s (VAE_TIMEOUT); send less at once"
        assert (response.status_code, response.json()) == (504, {"error": message})
        self.assert_well(faulty)

    @ALONE
    def test_the_deadline_drops_waiting_requests(self, faulty: Endpoint) -> None:
        before = metric(faulty, "vae_batch_size_count")
        with ThreadPoolExecutor(5) as clients:
            statuses = Counter(
                response.status_code for response in clients.map(lambda _: send_request(faulty, SLOW), range(5))
            )
        assert set(statuses) <= {200, 504}
        assert statuses[504] >= 4
        wait_for_metric(faulty, "inf_batch_current_size", 0)
        assert metric(faulty, "vae_batch_size_count") - before <= 2  # the second had begun at its deadline
        self.assert_well(faulty)

    def test_a_body_that_does_not_arrive_is_408(self, faulty: Endpoint) -> None:
        before = metric(faulty, "vae_bytes_in_flight")  # the thread of an earlier test
        connection = open_connection(faulty)
        connection.putrequest("POST", "/")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"\0" * 10)
        response = connection.getresponse()
        message = {"error": f"the body did not arrive within {TIMEOUT} s (VAE_TIMEOUT)"}
        assert (response.status, json.loads(response.read())) == (408, message)
        connection.close()
        assert metric(faulty, "vae_bytes_in_flight") <= before
        self.assert_well(faulty)

    @ALONE
    def test_out_of_memory_is_tried_in_the_next_mode(self, faulty: Endpoint) -> None:
        before = metric(faulty, "vae_out_of_memory_total")
        response = send_request(faulty, OUT_OF_MEMORY)
        assert (response.status_code, response.headers["X-VAE-Mode"]) == (200, "tiled")
        assert metric(faulty, "vae_out_of_memory_total") - before == 2
        self.assert_well(faulty)

    @ALONE
    def test_a_lack_of_memory_is_503(self, faulty: Endpoint) -> None:
        response = send_request(faulty, NEVER_ENOUGH)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert "takes about 0.0 GB of memory even in tiles, which this device does not have free" in response.text
        self.assert_well(faulty)

    @ALONE
    def test_a_nan_result_is_an_error(self, faulty: Endpoint) -> None:
        response = faulty.post(faulty.latents(), seed=NOT_FINITE)
        assert response.status_code == 422
        assert response.json()["error"].startswith("the VAE gives NaN or infinity for this decode request")
        self.assert_well(faulty)

    def test_disconnected_clients_leave_nothing_behind(self, faulty: Endpoint) -> None:
        latents = faulty.latents()
        query = "shape=1&shape=4&shape=8&shape=12&dtype=float32"
        head = f"POST /?{query}&seed={{}} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {latents.nbytes}\r\n\r\n"
        body = latents.numpy().tobytes()
        normal, slow = head.format(1).encode(), head.format(SLOW).encode()
        for sent, wait in (
            (normal[:20], 0),  # in the head
            (normal, 0.05),  # before the body
            (normal + body[:100], 0.05),  # in the body
            (slow + body, 0.3),  # on the device
            (normal + body, 0),  # at a random stage
            (normal + body, 0.1),  # during or after the response
        ):
            with socket.create_connection(("127.0.0.1", urlsplit(faulty.url).port)) as connection:
                connection.sendall(sent)
                time.sleep(wait)
        wait_for_metric(faulty, "inf_batch_current_size", 0)
        wait_for_metric(faulty, "vae_bytes_in_flight", 0)
        self.assert_well(faulty)

    def assert_well(self, endpoint: Endpoint) -> None:
        response = send_request(endpoint)
        assert (response.status_code, response.headers["X-VAE-Mode"]) in ((200, "full"), (200, "fast"))
        assert health(endpoint) == (200, "Ok")


@pytest.fixture(scope="module", params=SERVERS)
def videos(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    """Return an endpoint of a video model, whose requests may take far longer than its deadline."""
    log, key = tmp_path_factory.mktemp("videos") / "log", "hunyuan-video"
    with faulty_endpoint(request.param, key, checkpoint(key), log, VAE_TIMEOUT=str(LONG_TIMEOUT)) as endpoint:
        while not send_request(endpoint).ok:  # as in `faulty`
            pass
        yield endpoint


class TestAbandonedPass:
    """Tests that an abandoned pass stops, so that the next request gets the device."""

    LONG = {"frames": 65, "height": 512, "width": 512}
    """A request of some minutes on a CPU."""

    @pytest.fixture
    def one_pass_alone(self, videos: Endpoint) -> Iterator[None]:
        """Check at the end that a small request succeeds and that no other pass has finished."""
        passes = 'vae_passes_total{mode="full",model="hunyuan-video",task="decode"}'
        expected = send_request(videos)
        assert expected.ok, expected.text
        before, stopped = metric(videos, passes), metric(videos, "vae_stopped_passes_total")
        yield
        response = send_request(videos)
        assert (response.status_code, response.content == expected.content) == (200, True)
        assert metric(videos, passes) == before + 1
        assert metric(videos, "vae_stopped_passes_total") == stopped + 1
        assert "stopped a pass after" in videos.log.read_text()
        assert health(videos) == (200, "Ok")

    @pytest.mark.usefixtures("one_pass_alone")
    @pytest.mark.parametrize("output_type", ["pt", "mp4"])
    def test_a_pass_stops_when_its_client_disconnects(self, videos: Endpoint, output_type: str) -> None:
        latents = videos.latents(**self.LONG).half()
        shape = "&".join(f"shape={size}" for size in latents.shape)
        connection = open_connection(videos)
        connection.request("POST", f"/?{shape}&dtype=float16&output_type={output_type}", body=tensor_bytes(latents))
        wait_for_metric(videos, "inf_batch_current_size", 1)
        connection.close()

    @pytest.mark.usefixtures("one_pass_alone")
    @pytest.mark.parametrize("videos", ["standalone"], indirect=True)
    def test_a_pass_stops_at_its_deadline(self, videos: Endpoint) -> None:
        response = videos.post(videos.latents(**self.LONG).half(), output_type="pt")
        message = f"no response within {LONG_TIMEOUT} s (VAE_TIMEOUT); send less at once"
        assert (response.status_code, response.json()) == (504, {"error": message})


class TestDeviceFailures:
    @pytest.mark.parametrize(
        ("start", "fault"),
        [("standalone", DEVICE_LOST), ("standalone", THREAD_ENDS), ("toolkit", DEVICE_LOST)],
        indirect=["start"],
    )
    def test_a_lost_device_fails_all_requests(self, start: Start, fault: int) -> None:
        endpoint = start(DEVICE_SECONDS="0.7")
        with ThreadPoolExecutor(4) as clients:
            busy = clients.submit(send_request, endpoint, SLOW)
            wait_for_metric(endpoint, "inf_batch_current_size", 1)
            doomed = clients.submit(send_request, endpoint, fault)
            wait_for_metric(endpoint, "inf_queue_size", 1)
            waiting = [clients.submit(send_request, endpoint) for _ in range(2)]
            assert busy.result().ok
            responses = [future.result() for future in (doomed, *waiting)]
        for response in [*responses, send_request(endpoint)]:
            assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
            assert response.json() == {"error": "device 0 is lost; try again soon"}
        for path in ("/", "/health"):
            response = requests.get(endpoint.url + path, timeout=5)
            assert (response.status_code, response.json()) == (503, {"error": "device 0 is lost"})

    @START_ALONE
    def test_a_stuck_device_makes_health_fail(self, start: Start) -> None:
        endpoint = start(DEVICE_SECONDS="3.5", VAE_TIMEOUT="1")
        assert send_request(endpoint, SLOW).status_code == 504
        seen = [health(endpoint)]
        deadline = time.monotonic() + 30
        while (seen[-1] != (200, "Ok") or len(seen) < 3) and time.monotonic() < deadline:
            if (now := health(endpoint)) != seen[-1]:
                seen.append(now)
            time.sleep(0.02)
        assert seen == [(200, "Ok"), (503, '{"error":"a device is stuck"}'), (200, "Ok")]


class TestSigterm:
    def terminate(self, endpoint: Endpoint) -> psutil.Process:
        """Send SIGTERM to the server's process."""
        server = listening(urlsplit(endpoint.url).port)
        os.kill(server.pid, signal.SIGTERM)
        return server

    def test_accepted_requests_are_finished(self, start: Start) -> None:
        endpoint = start(DEVICE_SECONDS="0.5")
        kept = open_connection(endpoint)
        with ThreadPoolExecutor(3) as clients:
            responses = [clients.submit(send_request, endpoint, SLOW) for _ in range(3)]
            wait_for_metric(endpoint, "inf_queue_size", 2)
            server = self.terminate(endpoint)
            states = [HEALTH["requests are taken"], *HEALTH["after SIGTERM"].split(", then ")]
            seen = [state for state in poll_health(endpoint.url, last=states[-1]) if state != "connection closed"]
            assert seen == [state for state in states if state in seen]
            assert seen[-1] == states[-1]
            assert [future.result().status_code for future in responses] == [200, 200, 200]
        with suppress(http.client.HTTPException, OSError):  # refused, or 503
            kept.request("GET", "/health")
            assert kept.getresponse().status == 503
        kept.close()
        with pytest.raises(requests.ConnectionError):
            send_request(endpoint)
        server.wait(timeout=10)  # raises if the process does not end

    def test_unfinished_requests_get_a_503(self, start: Start) -> None:
        endpoint = start(DEVICE_SECONDS="4", VAE_GRACE="1")
        with ThreadPoolExecutor(3) as clients:
            responses = [clients.submit(send_request, endpoint, SLOW) for _ in range(3)]
            wait_for_metric(endpoint, "inf_queue_size", 2)
            server = self.terminate(endpoint)
            for future in responses:
                response = future.result()
                message = {"error": "the service is shutting down; try again soon"}
                assert (response.status_code, response.json()) == (503, message)
                assert response.headers["Retry-After"] == "1"
        server.wait(timeout=10)  # raises if the process does not end

    @START_ALONE
    def test_an_incomplete_body_does_not_delay_the_end(self, start: Start) -> None:
        endpoint = start(VAE_GRACE="1")
        connection = open_connection(endpoint)
        connection.putrequest("POST", "/")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"\0" * 500)
        wait_for_metric(endpoint, "vae_bytes_in_flight", 500)
        server = self.terminate(endpoint)
        response = connection.getresponse()
        message = {"error": "the service is shutting down; try again soon"}
        assert (response.status, json.loads(response.read())) == (503, message)
        connection.close()
        server.wait(timeout=5)  # raises if the process does not end

    def test_requests_are_taken_for_the_drain_delay(self, start: Start) -> None:
        """A second SIGTERM ends the delay, which is long, so that the test does not depend on the time."""
        endpoint = start(VAE_DRAIN_DELAY="100")
        kept = open_connection(endpoint)
        kept.request("GET", "/metrics")
        response = kept.getresponse()
        assert (response.status, response.read() != b"", response.getheader("Connection")) == (200, True, None)
        server = self.terminate(endpoint)
        assert poll_health(endpoint.url, last="503")[-1] == "503"
        kept.request("POST", "/", b"no tensor")
        response = kept.getresponse()
        assert (response.status, response.getheader("Connection")) == (400, "close")
        kept.close()
        for _ in range(2):
            response = send_request(endpoint)
            assert (response.status_code, response.headers["Connection"]) == (200, "close")
        self.terminate(endpoint)
        server.wait(timeout=10)  # raises if the process does not end
