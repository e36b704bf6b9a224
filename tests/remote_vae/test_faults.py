"""What a user of `RemoteVAE` sees when the way to the service is difficult. No token is ever in it."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from remote_vae import Client, RemoteVAE, RemoteVAEError
from tests.difficult_way import Way, difficult_way
from tests.small_service import Service

TOKEN = "hf_theTokenThatNobodyMaySee"
LATENTS = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def way(service: Service) -> Iterator[Way]:
    with difficult_way(f"{service.url}/sd-v1") as way:
        yield way


@pytest.fixture(autouse=True)
def no_token_is_said(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    said = capfd.readouterr()
    assert TOKEN not in caplog.text + said.out + said.err


def posts(way: Way) -> int:
    return sum(method == "POST" for method, _, _ in way.seen)


def test_a_replica_that_starts_is_waited_for(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    way.starts_until = time.monotonic() + 20
    remote = RemoteVAE(way.url)
    assert time.monotonic() > way.starts_until
    assert remote.decode(LATENTS).sample.shape == (1, 3, 64, 64)
    waited = [record.getMessage() for record in caplog.records if record.name == "remote_vae"]
    assert waited[0].startswith(f"{way.url}/config: 502 Service Unavailable; waiting, 0 s of at most 900 s so far")
    assert 2 <= len(waited) <= 4


def test_a_body_is_not_sent_again_before_the_service_is_there(way: Way) -> None:
    remote = RemoteVAE(way.url)
    way.starts_until = time.monotonic() + 4
    remote.decode(LATENTS)
    assert posts(way) == 2
    assert [path for _, path, _ in way.seen].count("/health") >= 2


def test_patience_ends(way: Way) -> None:
    way.starts_until = time.monotonic() + 60
    start = time.monotonic()
    with pytest.raises(RemoteVAEError, match="503 Service Unavailable") as caught:
        RemoteVAE(way.url, patience=3)
    assert caught.value.status == 503
    assert time.monotonic() - start < 15


def test_an_answer_that_breaks_off_is_asked_for_again(way: Way, service: Service) -> None:
    remote = RemoteVAE(way.url)
    way.drops = 2
    assert torch.equal(remote.decode(LATENTS).sample, service.model("sd-v1").decode(LATENTS).sample)
    way.drops = 100
    with pytest.raises(RemoteVAEError, match="broke before the answer was complete"):
        remote.decode(LATENTS)
    assert posts(way) == 6


def test_a_service_that_hangs(way: Way) -> None:
    remote = RemoteVAE(way.url, timeout=1)
    way.hangs = True
    with pytest.raises(RemoteVAEError, match=r"gave no answer for 1 s$"):
        remote.decode(LATENTS)
    assert posts(way) == 1


def test_what_is_wrong_is_told_at_once_in_the_services_words(way: Way) -> None:
    remote = RemoteVAE(way.url)
    with pytest.raises(RemoteVAEError, match=r"/decode: 422 `shape` \[1, 5, 8, 8\] is no shape of this VAE's latents"):
        remote.decode(torch.zeros(1, 5, 8, 8))
    assert posts(way) == 1
    assert remote.decode(LATENTS).sample.shape == (1, 3, 64, 64)


def test_a_token(way: Way) -> None:
    way.token = TOKEN
    assert RemoteVAE(way.url, token=TOKEN).decode(LATENTS).sample.shape == (1, 3, 64, 64)
    assert TOKEN not in repr(Client(way.url, TOKEN))
    with pytest.raises(RemoteVAEError, match=r"401 Unauthorized; it needs a token: RemoteVAE\(url, token=\.\.\.\)$"):
        RemoteVAE(way.url)
    wrong = TOKEN + "s"
    with pytest.raises(RemoteVAEError, match="403 Forbidden: Bearer <token> may not; the token is not taken") as caught:
        RemoteVAE(way.url, token=wrong)
    assert TOKEN not in str(caught.value)


def test_the_login_goes_to_hugging_face_alone(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    RemoteVAE(way.url)
    assert not any("Authorization" in headers for _, _, headers in way.seen)
    RemoteVAE(way.url, trusted_hosts=["127.0.0.1"])
    assert way.seen[-1][2]["Authorization"] == f"Bearer {TOKEN}"
    hosts = {
        "https://x1y2.us-east-1.aws.endpoints.huggingface.cloud": TOKEN,
        "http://x1y2.us-east-1.aws.endpoints.huggingface.cloud": None,
        "https://endpoints.huggingface.cloud.example.org": None,
        "https://example.org/.endpoints.huggingface.cloud": None,
    }
    assert {url: Client(url)._token for url in hosts} == hosts


def test_no_network() -> None:
    with pytest.raises(RemoteVAEError, match=r"the name in https://nowhere\.invalid is not known: is it spelt right"):
        RemoteVAE("https://nowhere.invalid")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(RemoteVAEError, match=f"http://127.0.0.1:{port} cannot be reached"):
        RemoteVAE(f"http://127.0.0.1:{port}", patience=2)


def test_a_paused_endpoint(way: Way) -> None:
    way.answer = (400, "Bad Request: Invalid state")
    with pytest.raises(RemoteVAEError, match=r"Invalid state; a paused endpoint says so: make resume MODEL=\.\.\.$"):
        RemoteVAE(way.url).decode(LATENTS)


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
"""URLs that are none, and those of which two readers may name two hosts."""


@pytest.mark.parametrize("url", ODD)
def test_no_url_of_an_endpoint(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ValueError, match="endpoint") as caught:
        Client(url)
    assert "secret" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "http://[::1]:9/sdxl", "HTTPS://X1.Endpoints.HuggingFace.Cloud/", "http://my_box:80"]
)
def test_urls_of_endpoints(url: str) -> None:
    assert Client(url).url == url.rstrip("/")


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_wrong_port_is_not_waited_for(name: str) -> None:
    """While a replica that starts is: its proxy responds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(RemoteVAEError, match=r"nothing listens there \(connection refused\); is the port right"):
        RemoteVAE(f"http://{name}:{port}")
    assert time.monotonic() - start < 10


def test_a_server_that_starts_again_is_waited_for(service: Service) -> None:
    """Once it has responded, its address is right."""
    with difficult_way(f"{service.url}/sd-v1") as way:
        client = Client(way.url, patience=60)
        client.request("GET", "/health", headers={"Connection": "close"})
        port = way.server_address[1]
    way.server_close()

    def start_again() -> None:
        time.sleep(5)
        with difficult_way(f"{service.url}/sd-v1", port) as again:
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
