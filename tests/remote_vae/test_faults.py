"""Tests of errors and log lines of `RemoteVAE` when the service or the network fails. They never contain a token."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from remote_vae import Client, RemoteVAE, RemoteVAEError
from remote_vae import client as client_module
from scripts.local_server import free_port
from tests.support.faulty_proxy import FaultyProxy, faulty_proxy
from tests.support.small_service import Service
from tests.support.values import assert_same

TOKEN = "hf_theTokenThatNobodyMaySee"
LATENTS = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def faulty(service: Service) -> Iterator[FaultyProxy]:
    with faulty_proxy(f"{service.url}/sd-v1") as faulty:
        yield faulty


@pytest.fixture(autouse=True)
def no_token_is_printed(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    printed = capfd.readouterr()
    assert TOKEN not in caplog.text + printed.out + printed.err


@pytest.fixture
def fast_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the client's waits ten times shorter."""
    wait = Client._wait
    monkeypatch.setattr(Client, "_wait", lambda client, state: wait(client, state) / 10)
    monkeypatch.setattr(client_module, "REFUSED_TIMEOUT", client_module.REFUSED_TIMEOUT / 10)


def posts(faulty: FaultyProxy) -> int:
    return sum(method == "POST" for method, _, _ in faulty.seen)


@pytest.mark.usefixtures("fast_clock")
def test_requests_wait_for_a_starting_replica(faulty: FaultyProxy, caplog: pytest.LogCaptureFixture) -> None:
    faulty.starts_until = time.monotonic() + 2
    remote = RemoteVAE(faulty.url)
    assert time.monotonic() > faulty.starts_until
    assert remote.decode(LATENTS).sample.shape == (1, 3, 64, 64)
    lines = [record.getMessage() for record in caplog.records if record.name == "remote_vae"]
    assert lines[0].startswith(f"{faulty.url}/config: 502 Service Unavailable; retrying, 0 s of at most 900 s so far")
    assert 2 <= len(lines) <= 4


@pytest.mark.usefixtures("fast_clock")
def test_a_body_is_sent_again_only_after_the_service_responds(faulty: FaultyProxy) -> None:
    remote = RemoteVAE(faulty.url)
    faulty.starts_until = time.monotonic() + 0.4
    remote.decode(LATENTS)
    assert posts(faulty) == 2
    assert [path for _, path, _ in faulty.seen].count("/health") >= 2


@pytest.mark.parametrize("endpoints", [1, 2])
def test_a_toolkit_that_has_unloaded_its_idle_model_is_made_to_load_it(faulty: FaultyProxy, endpoints: int) -> None:
    faulty.is_unloaded = True
    remote = RemoteVAE([faulty.url, faulty.url.replace("127.0.0.1", "localhost")][:endpoints])
    faulty.is_unloaded = True
    assert remote.decode(LATENTS).sample.shape == (1, 3, 64, 64)
    assert [path for method, path, _ in faulty.seen if method == "POST"].count("/") == 2


def test_retries_end(faulty: FaultyProxy) -> None:
    faulty.starts_until = time.monotonic() + 60
    start = time.monotonic()
    with pytest.raises(RemoteVAEError, match="503 Service Unavailable") as caught:
        RemoteVAE(faulty.url, retry_timeout=3)
    assert caught.value.status == 503
    assert time.monotonic() - start < 30


@pytest.mark.usefixtures("fast_clock")
def test_an_incomplete_response_is_requested_again(faulty: FaultyProxy, service: Service) -> None:
    remote = RemoteVAE(faulty.url)
    faulty.drops = 2
    assert_same(remote.decode(LATENTS).sample, service.model("sd-v1").decode(LATENTS).sample)
    faulty.drops = 100
    with pytest.raises(RemoteVAEError, match="broke before the response was complete"):
        remote.decode(LATENTS)
    assert posts(faulty) == 6


def test_a_stuck_service(faulty: FaultyProxy) -> None:
    remote = RemoteVAE(faulty.url, timeout=1)
    faulty.hangs = True
    with pytest.raises(RemoteVAEError, match=r"did not respond for 1 s$"):
        remote.decode(LATENTS)
    assert posts(faulty) == 1


def test_a_refusal_is_raised_at_once_with_the_services_message(faulty: FaultyProxy) -> None:
    remote = RemoteVAE(faulty.url)
    with pytest.raises(RemoteVAEError, match=r"/decode: 422 `shape` \[1, 5, 8, 8\] is no shape of this VAE's latents"):
        remote.decode(torch.zeros(1, 5, 8, 8))
    assert posts(faulty) == 1
    assert remote.decode(LATENTS).sample.shape == (1, 3, 64, 64)


def test_a_token(faulty: FaultyProxy) -> None:
    faulty.token = TOKEN
    assert RemoteVAE(faulty.url, token=TOKEN).decode(LATENTS).sample.shape == (1, 3, 64, 64)
    assert TOKEN not in repr(Client(faulty.url, TOKEN))
    with pytest.raises(RemoteVAEError, match=r"401 Unauthorized; pass a token: RemoteVAE\(url, token=\.\.\.\)$"):
        RemoteVAE(faulty.url)
    wrong = TOKEN + "s"
    with pytest.raises(RemoteVAEError, match="403 Forbidden: Bearer <token> may not; the token is not") as caught:
        RemoteVAE(faulty.url, token=wrong)
    assert TOKEN not in str(caught.value)


def test_the_login_is_sent_only_to_hugging_face(faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    RemoteVAE(faulty.url)
    assert not any("Authorization" in headers for _, _, headers in faulty.seen)
    RemoteVAE(faulty.url, trusted_hosts=["127.0.0.1"])
    assert faulty.seen[-1][2]["Authorization"] == f"Bearer {TOKEN}"
    hosts = {
        "https://x1y2.us-east-1.aws.endpoints.huggingface.cloud": TOKEN,
        "http://x1y2.us-east-1.aws.endpoints.huggingface.cloud": None,
        "https://endpoints.huggingface.cloud.example.org": None,
        "https://example.org/.endpoints.huggingface.cloud": None,
    }
    assert {url: Client(url)._token for url in hosts} == hosts


@pytest.mark.slow
def test_no_network() -> None:
    with pytest.raises(RemoteVAEError, match=r"the host name in https://nowhere\.invalid is unknown"):
        RemoteVAE("https://nowhere.invalid")
    port = free_port()
    with pytest.raises(RemoteVAEError, match=f"http://127.0.0.1:{port} cannot be reached"):
        RemoteVAE(f"http://127.0.0.1:{port}", retry_timeout=2)


def test_a_paused_endpoint(faulty: FaultyProxy) -> None:
    faulty.response = (400, "Bad Request: Invalid state")
    with pytest.raises(RemoteVAEError, match=r"Invalid state; .* a paused endpoint: make resume MODEL=\.\.\.$"):
        RemoteVAE(faulty.url).decode(LATENTS)


ODD = [
    "localhost:8000",
    "ftp://x",
    "https://user:secret@x",
    "https://x?token=1",
    "https://@x1.endpoints.huggingface.cloud",
    "https://evil.org%2f.endpoints.huggingface.cloud",
    "https://evil.org\\.endpoints.huggingface.cloud",
    "https://evil.org .endpoints.huggingface.cloud",
    "https://evil.org\t.endpoints.huggingface.cloud",
    "https://evil.org\n.endpoints.huggingface.cloud",
    "https://evil.org\uff0fx.endpoints.huggingface.cloud",
    "https://evil.org;.endpoints.huggingface.cloud",
    "https://.endpoints.huggingface.cloud",
    "https://a..endpoints.huggingface.cloud",
    "https://x.endpoints.huggingface.cloud:0",
    "https://x.endpoints.huggingface.cloud:99999",
    "https://[::1%25eth0]",
    "https://[::g]",
    "https:///x.endpoints.huggingface.cloud",
    "https:\\\\x.endpoints.huggingface.cloud",
    " https://x.endpoints.huggingface.cloud",
    "https://x.endpoints.huggingface.cloud/\u202etxt",
    "",
]
"""Strings that are not URLs of endpoints, and URLs in which two readers may see two hosts."""


@pytest.mark.parametrize("url", ODD)
def test_invalid_urls_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ValueError, match="endpoint") as caught:
        Client(url)
    assert "secret" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "http://[::1]:9/sdxl", "HTTPS://X1.Endpoints.HuggingFace.Cloud/", "http://my_box:80"]
)
def test_valid_urls_are_accepted(url: str) -> None:
    assert Client(url).url == url.rstrip("/")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_wrong_port_is_not_retried_for_long(name: str) -> None:
    """Test that the retries end soon. For a starting replica, its proxy would respond."""
    port, start = free_port(), time.monotonic()
    with pytest.raises(RemoteVAEError, match=r"connection refused, nothing listens there; is the port right"):
        RemoteVAE(f"http://{name}:{port}")
    assert time.monotonic() - start < 60  # less than the 900 s of other retries


@pytest.mark.usefixtures("fast_clock")
def test_requests_wait_for_a_restarting_server(service: Service) -> None:
    """Test that retries continue for an address that has responded before."""
    port = free_port()
    with faulty_proxy(f"{service.url}/sd-v1", port) as faulty:
        client = Client(faulty.url, retry_timeout=60)
        client.request("GET", "/health", headers={"Connection": "close"})
    faulty.server_close()

    def start_again() -> None:
        time.sleep(0.5)
        with faulty_proxy(f"{service.url}/sd-v1", port) as again:
            stop.wait(60)
            assert again.seen

    stop = threading.Event()
    thread = threading.Thread(target=start_again)
    thread.start()
    try:
        assert client.config()["model"] == "sd-v1"
    finally:
        stop.set()
        thread.join()


def test_another_service(service: Service) -> None:
    with pytest.raises(RemoteVAEError, match=r"404 .*this is no service of this project"):
        RemoteVAE(service.url)


def test_several_endpoints(faulty: FaultyProxy, service: Service) -> None:
    """Encode and decode while one of two endpoints starts, is paused, breaks off, and works again."""
    vae = RemoteVAE([faulty.url, f"{service.url}/sd-v1"], "", retry_timeout=20)
    local, latents = service.model("sd-v1"), torch.randn(2, 4, 8, 8)
    expected = local.decode(latents).sample
    for starts_until, response, drops in ((1e9, None, 0), (0, (400, "Bad Request: Invalid state"), 0), (0, None, 9)):
        faulty.starts_until, faulty.response, faulty.drops = starts_until, response, drops
        for endpoint in vae.remote.client.endpoints:
            endpoint.paused_until = 0
        assert_same(vae.decode(latents).sample, expected)
    assert vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 4, 8, 8)
    (faulty.starts_until, faulty.response, faulty.drops), served = (0, None, 0), len(faulty.seen)
    for endpoint in vae.remote.client.endpoints:
        endpoint.paused_until = endpoint.seconds = 0
    threads = [threading.Thread(target=vae.decode, args=(latents,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(faulty.seen) > served
