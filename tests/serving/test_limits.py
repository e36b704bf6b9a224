"""A service under load and under attack: bodies that are too large, a full queue, clients that go away."""

import http.client
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
import torch
from diffusers import AutoencoderKL

from scripts.local_server import serve
from tests.conftest import Endpoint


@pytest.fixture(scope="module")
def narrow(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """An endpoint that takes 1 MB at a time and lets two requests wait."""
    weights, log = checkpoint("sd-v1"), tmp_path_factory.mktemp("log") / "narrow.log"
    limits = {"VAE_MAX_BODY_MB": "1", "VAE_MAX_QUEUE": "2"}
    with serve("--model", "sd-v1", "--weights", str(weights), log=log, **limits) as url:
        yield Endpoint("sd-v1", url, AutoencoderKL.from_pretrained(weights), log)


def slow(endpoint: Endpoint) -> requests.Response:
    """A request that takes the device a while: 1024x1024."""
    return endpoint.post(torch.zeros(1, 4, 128, 128), output_type="pt", partial_postprocess=True)


def test_a_body_over_the_limit_is_413_whether_it_says_its_length_or_not(narrow: Endpoint) -> None:
    body = b"\0" * 1_500_000
    for data in (body, iter([body[:700_000], body[700_000:]])):
        response = requests.post(narrow.url, data=data, timeout=10)
        assert response.status_code == 413
        assert response.json() == {"error": "the body is larger than 1 MB, the limit here (VAE_MAX_BODY_MB)"}
    assert narrow.post(narrow.latents()).ok


def test_a_full_queue_answers_503_and_loses_nothing(narrow: Endpoint) -> None:
    with ThreadPoolExecutor(12) as clients:
        responses = list(clients.map(lambda _: slow(narrow), range(12)))
    statuses = Counter(response.status_code for response in responses)
    assert set(statuses) == {200, 503}
    assert statuses[200] >= 3  # one on the device, two waiting
    for response in responses:
        if response.status_code == 503:
            assert response.headers["Retry-After"] == "1"
            assert "requests are waiting already" in response.json()["error"]
    assert narrow.post(narrow.latents()).ok


def test_work_of_a_client_that_is_gone_is_dropped(narrow: Endpoint) -> None:
    with ThreadPoolExecutor(1) as client:
        busy = client.submit(slow, narrow)
        wait_for_metrics(narrow, "inf_batch_current_size 1")
        gone = http.client.HTTPConnection(urlsplit(narrow.url).netloc)
        gone.request("POST", "/?shape=1&shape=4&shape=8&shape=8&dtype=float32", body=bytes(1024))
        wait_for_metrics(narrow, "inf_queue_size 1")
        gone.close()
        wait_for_metrics(narrow, "inf_queue_size 0")
        assert not busy.done()
        assert busy.result().ok
    assert "Traceback" not in narrow.log.read_text()


def wait_for_metrics(endpoint: Endpoint, line: str) -> None:
    deadline = time.monotonic() + 20
    while line not in (metrics := requests.get(f"{endpoint.url}/metrics", timeout=5).text):
        assert time.monotonic() < deadline, metrics
        time.sleep(0.005)
