"""Tests of the origins and hosts that may call from a browser. Those in a browser: `make test-page`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
import requests

from handlers.serving.http.app import build_app
from tests.serving.test_page import send_request
from tests.support.endpoint import Endpoint

FOREIGN = {"Origin": "https://evil.example"}
CROSS_SITE = {"Sec_Fetch_Site": "cross-site"}


def status(method: str, path: str, *origins: str, loopback: str | None = None, **headers: str) -> int:
    """Return the status from an app without a model. It sends 503 for each request that it does not refuse."""
    app = build_app("sd-v1", origins)
    app.state.loopback_host = loopback
    return send_request(app, method, path, **headers).status_code


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/"), ("PUT", "/decode"), ("GET", "/config"), ("GET", "/metrics")]
)
@pytest.mark.parametrize(
    "headers",
    [
        FOREIGN,
        {"Origin": "null"},
        {"Origin": "http://service:8080"},  # the same host, another port
        {"Origin": "https://["},
        CROSS_SITE,
        {"Sec_Fetch_Site": "same-site", **FOREIGN},
        {"Sec_Fetch_Site": "cross-site", "Origin": "http://service"},
    ],
)
def test_a_page_of_another_origin_is_refused(method: str, path: str, headers: dict[str, str]) -> None:
    assert status(method, path, **headers) == 403
    if "Origin" in headers:
        assert status(method, path, "*", **headers) != 403


@pytest.mark.parametrize(
    "headers",
    [
        {},  # no browser
        {"Origin": "http://service"},
        {"Origin": "http://service:80"},
        {"Origin": "https://service"},  # behind a proxy that speaks TLS
        {"Origin": "https://a.example", "X_Forwarded_Host": "a.example, service"},
        {"Origin": "https://a.example", "Sec_Fetch_Site": "same-origin"},  # behind a proxy that changes the Host
        {"Sec_Fetch_Site": "none"},
        {"Sec_Fetch_Site": "same-origin"},
    ],
)
def test_the_web_demo_and_other_clients_may_call(headers: dict[str, str]) -> None:
    assert status("POST", "/decode", **headers) == 503
    assert status("GET", "/config", **headers) == 503


def test_links_and_probes_are_open() -> None:
    for path in ("/", "/health"):
        assert status("GET", path, **FOREIGN, **CROSS_SITE) == 503
    assert status("GET", "/config", **CROSS_SITE, Sec_Fetch_Mode="navigate") == 503
    assert status("POST", "/", **CROSS_SITE, Sec_Fetch_Mode="navigate") == 403  # a form


def test_configured_origins_may_call() -> None:
    assert status("POST", "/", "https://evil.example", **FOREIGN, **CROSS_SITE) == 503
    assert status("POST", "/", "https://a.example", **FOREIGN, **CROSS_SITE) == 403


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost:8000", 503),
        ("vae.localhost", 503),
        ("127.0.0.1:8000", 503),
        ("[::1]:8000", 503),
        ("vae.test", 503),
        ("evil.example:8000", 403),
        ("192.168.0.1", 403),
        ("localhost.evil.example", 403),
        ("[", 403),
        ("", 503),
    ],
)
def test_a_server_on_a_loopback_address_accepts_only_local_hosts(host: str, expected: int) -> None:
    assert status("GET", "/health", loopback="vae.test", Host=host) == expected
    assert status("GET", "/health", Host=host) == 503


def test_the_host_of_a_reverse_proxy_is_a_configured_origin() -> None:
    named = {"loopback": "127.0.0.1", "Host": "vae.example"}
    assert status("POST", "/", **named) == 403
    assert status("POST", "/", "https://vae.example", **named) == 503


def test_a_refusal_has_a_remedy_and_is_logged(running: Callable[[str], Endpoint]) -> None:
    """Test a server that starts as users start it."""
    endpoint = running("sd-v1")
    form = {"Content-Type": "application/x-www-form-urlencoded", **FOREIGN}
    refused = endpoint.post(endpoint.latents(), headers=form)
    rebound = requests.get(
        f"{endpoint.url}/config", headers={"Host": f"evil.example:{urlsplit(endpoint.url).port}"}, timeout=9
    )
    for response, message in (
        (refused, "a page of 'https://evil.example' may not call"),
        (rebound, "the Host 'evil.example:"),
    ):
        assert response.status_code == 403
        assert message in response.json()["error"]
        assert "VAE_CORS_ORIGINS" in response.json()["error"]
        for _ in range(100):  # a line is written after the response
            text = endpoint.log.read_text()
            lines = [json.loads(line[line.index("{") :]) for line in text.splitlines() if line.endswith("}")]
            if any(line["status"] == 403 and line["error"].startswith(message) for line in lines):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"no line about {message}: {text}")
    assert endpoint.post(endpoint.latents()).ok
