"""Tests of an operator's view: a line for each request, and the counters of /metrics."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.serving.test_limits import metric
from tests.support.endpoint import SERVERS, Endpoint, faulty_endpoint


@pytest.fixture(scope="module", params=SERVERS)
def endpoint(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    log = tmp_path_factory.mktemp("access") / "log"
    with faulty_endpoint(request.param, "sd-v1", checkpoint("sd-v1"), log) as endpoint:
        yield endpoint


def read_line(endpoint: Endpoint, request_id: str) -> dict[str, Any]:
    """Return a request's log line. The server writes it after the response."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        lines = re.findall(r'\{"request_id": .*\}', endpoint.log.read_text())
        if matches := [line for line in map(json.loads, lines) if line["request_id"] == request_id]:
            assert len(matches) == 1
            return matches[0]
        time.sleep(0.01)
    raise AssertionError(f"no line of {request_id}")


def test_a_line_describes_request_and_response(endpoint: Endpoint) -> None:
    response = endpoint.post(endpoint.latents(), "/decode", headers={"X-Request-Id": "good-1"}, image_format="png")
    line = read_line(endpoint, "good-1")
    milliseconds = {name: line.pop(name) for name in ("ms", "payload_ms", "queue_ms", "vae_ms", "output_ms")}
    assert line == {
        "request_id": "good-1",
        "method": "POST",
        "path": "/decode",
        "status": 200,
        "task": "decode",
        "shape": [1, 4, 8, 12],
        "output": "image",
        "mode": "full",
        "received_bytes": 4 * 4 * 8 * 12,
        "sent_bytes": len(response.content),
    }
    assert milliseconds["ms"] >= milliseconds["vae_ms"] > 0


def test_the_line_of_a_wrong_request_has_the_error(endpoint: Endpoint) -> None:
    response = endpoint.post(endpoint.latents(), headers={"X-Request-Id": "wrong-1"}, dtype="int4")
    line = read_line(endpoint, "wrong-1")
    assert (line["status"], line["error"]) == (400, response.json()["error"])


@pytest.mark.parametrize(
    ("request_id", "kept"),
    [("abc-123_4.5:6", True), ("x" * 128, True), ("x" * 129, False), ('a"b', False), ("ümlaut", False), ("", False)],
)
def test_a_safe_request_id_is_used_and_returned(endpoint: Endpoint, request_id: str, kept: bool) -> None:
    for method, path in (("GET", "/health"), ("GET", "/nowhere"), ("DELETE", "/"), ("POST", "/encode")):
        headers = {"X-Request-Id": request_id.encode()}
        returned = requests.request(method, endpoint.url + path, headers=headers, timeout=5).headers["X-Request-Id"]
        assert (returned == request_id) is kept
        assert re.fullmatch(r"[\w.:-]{1,128}", returned)


def test_each_request_has_its_own_id(endpoint: Endpoint) -> None:
    assert len({requests.get(endpoint.url, timeout=5).headers["X-Request-Id"] for _ in range(2)}) == 2


def test_probes_write_no_lines(endpoint: Endpoint) -> None:
    before = endpoint.log.read_text()
    requests.get(f"{endpoint.url}/health", headers={"X-Request-Id": "probe"}, timeout=5)
    requests.get(f"{endpoint.url}/metrics", timeout=5)
    endpoint.post(endpoint.latents(), headers={"X-Request-Id": "after-probe"})
    read_line(endpoint, "after-probe")
    assert "probe" not in endpoint.log.read_text()[len(before) :].replace("after-probe", "")


def test_metrics_count_requests(endpoint: Endpoint) -> None:
    names = {
        "accepted": 'vae_requests_total{model="sd-v1",route="/decode",status="200"}',
        "refused": 'vae_requests_total{model="sd-v1",route="/decode",status="400"}',
        "received": "vae_received_bytes_total",
        "sent": "vae_sent_bytes_total",
        "batches": "vae_batch_size_count",
        "passes": 'vae_passes_total{mode="full",model="sd-v1",task="decode"}',
        **{stage: f'vae_stage_seconds_count{{stage="{stage}"}}' for stage in ("payload", "queue", "vae", "output")},
    }
    endpoint.post(endpoint.latents(), "/decode", exact=True)
    endpoint.post(endpoint.latents(), "/decode", dtype="int4")  # now each counter has a value
    before = {key: metric(endpoint, name) for key, name in names.items()}
    response = endpoint.post(endpoint.latents(), "/decode", headers={"X-Request-Id": "counted"}, exact=True)
    assert endpoint.post(endpoint.latents(), "/decode", dtype="int4", headers={"X-Request-Id": "counted-2"}).text
    read_line(endpoint, "counted-2")
    difference = {key: metric(endpoint, name) - before[key] for key, name in names.items()}
    size = endpoint.latents().nbytes
    assert difference.pop("sent") > len(response.content)  # the error, and /metrics itself
    assert difference.pop("received") == 2 * size
    assert set(difference.values()) == {1}
    for name in ("vae_out_of_memory_total", "vae_upcast_total", "vae_bytes_in_flight", "inf_queue_size"):
        assert metric(endpoint, name) == 0
    assert (
        0
        < metric(endpoint, 'vae_device_free_bytes{device="cpu"}')
        < metric(endpoint, 'vae_device_total_bytes{device="cpu"}')
    )
    assert metric(endpoint, "process_resident_memory_bytes") > 1e8


def test_unknown_paths_share_a_series(endpoint: Endpoint) -> None:
    for number in range(3):
        requests.post(f"{endpoint.url}/nowhere/{number}", timeout=5)
    text = requests.get(f"{endpoint.url}/metrics", timeout=5).text
    assert "nowhere" not in text
    assert metric(endpoint, 'vae_requests_total{model="sd-v1",route="other",status="404"}') >= 3
