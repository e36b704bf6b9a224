"""Tests of the web demo's headers and of pages of other origins over HTTP. Those in a browser: `make test-page`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import anyio
import httpx2 as httpx
import pytest
import requests
from starlette.applications import Starlette

from handlers.serving.http.app import EXPOSED, build_app
from handlers.serving.http.web_demo import PAGE
from handlers.serving.settings import Settings
from tests.support.endpoint import Endpoint

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


def send_request(app: Starlette, method: str, path: str, **headers: str) -> httpx.Response:
    """Send a request to an app without a model, so without a server."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return anyio.run(send)


@pytest.fixture
def url(running: Callable[[str], Endpoint]) -> str:
    return running("sd-v1").url


def test_a_browser_gets_the_web_demo(url: str) -> None:
    response = requests.get(url, headers={"Accept": BROWSER}, timeout=5)
    assert (response.status_code, response.content) == (200, PAGE)
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert response.headers["Vary"] == "Accept"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    policy = response.headers["Content-Security-Policy"].split("; ")
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert not {word for entry in policy for word in entry.split()} & {
        "'unsafe-inline'",
        "'unsafe-eval'",
        "*",
        "https:",
    }
    head = requests.head(url, headers={"Accept": BROWSER}, timeout=5)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("accept", ["*/*", "text/plain", "application/json", "", None])
def test_other_clients_get_the_response_of_a_probe(url: str, accept: str | None) -> None:
    response = requests.get(url, headers={"Accept": accept}, timeout=5)
    assert (response.status_code, response.text) == (200, "Ok")
    assert response.headers["Content-Type"].startswith("text/plain")
    assert "Content-Security-Policy" not in response.headers


def test_the_web_demo_is_only_at_get_of_the_root(url: str) -> None:
    for path in ("/health", "/config", "/metrics"):
        assert "html" not in requests.get(url + path, headers={"Accept": BROWSER}, timeout=5).headers["Content-Type"]
    refused = requests.post(url, headers={"Accept": BROWSER}, timeout=5)
    assert refused.status_code == 400
    assert list(refused.json()) == ["error"]


def test_the_web_demo_works_while_the_model_loads() -> None:
    assert send_request(build_app(), "GET", "/", Accept=BROWSER).content == PAGE
    assert send_request(build_app(), "GET", "/").status_code == 503


def test_the_web_demo_has_no_external_resources() -> None:
    text = PAGE.decode()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    assert set(re.findall(r"https?://[^\s'\"]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<[^>]+\s(?:on\w+|style)=", text)
    assert "innerHTML" not in text


ORIGIN = "https://a.example"
PREFLIGHT = {
    "Access_Control_Request_Method": "POST",
    "Access_Control_Request_Headers": "authorization,content-type",
}


def calling(origins: str) -> Starlette:
    return build_app("sd-v1", Settings(cors_origins=origins).cors_origins)


class TestOtherOrigins:
    def test_other_origins_may_not_call_by_default(self, url: str) -> None:
        response = requests.get(f"{url}/config", headers={"Origin": ORIGIN}, timeout=5)
        assert "Access-Control-Allow-Origin" not in response.headers
        headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
        assert requests.options(f"{url}/decode", headers=headers, timeout=5).status_code == 403

    @pytest.mark.parametrize("allowed", [ORIGIN, "*"])
    def test_configured_origins_may_call(self, allowed: str) -> None:
        app = calling(allowed)
        preflight = send_request(app, "OPTIONS", "/decode", Origin=ORIGIN, **PREFLIGHT)
        assert (preflight.status_code, preflight.headers["Access-Control-Allow-Origin"]) == (200, allowed)
        assert "authorization" in preflight.headers["Access-Control-Allow-Headers"].lower()
        response = send_request(app, "GET", "/config", Origin=ORIGIN)
        assert (response.status_code, response.headers["Access-Control-Allow-Origin"]) == (503, allowed)
        assert response.headers["Access-Control-Expose-Headers"].split(", ") == list(EXPOSED)
        assert "Access-Control-Allow-Credentials" not in response.headers

    def test_unknown_origins_may_not_call(self) -> None:
        app, other = calling(ORIGIN), "https://b.example"
        preflight = send_request(app, "OPTIONS", "/decode", Origin=other, **PREFLIGHT)
        assert (preflight.status_code, list(preflight.json())) == (403, ["error"])
        assert "Access-Control-Allow-Origin" not in send_request(app, "GET", "/config", Origin=other).headers

    def test_other_origins_can_read_errors(self) -> None:
        app = calling(ORIGIN)
        app.state.handler = object()  # the app has no pipeline
        response = send_request(app, "GET", "/health", Origin=ORIGIN)
        assert (response.status_code, response.headers["Access-Control-Allow-Origin"]) == (500, ORIGIN)


@pytest.mark.parametrize("value", ["a.example", "https://a.example/page", "https://*.example", "null"])
def test_an_invalid_origin_is_refused_at_the_start(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_CORS_ORIGINS", value)
    with pytest.raises(ValueError, match=r"^VAE_CORS_ORIGINS: .*expected origins such as https://example.org"):
        Settings.load(tmp_path)


def test_origins_are_separated_by_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_CORS_ORIGINS", "https://A.example, http://localhost:3000,")
    assert Settings.load(tmp_path).cors_origins == ("https://a.example", "http://localhost:3000")
