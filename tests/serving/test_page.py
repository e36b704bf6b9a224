"""The page and its headers, as HTTP sees them, and pages of other origins; in a browser: `make test-page`."""

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
from tests.conftest import Endpoint

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


def ask(app: Starlette, method: str, path: str, **headers: str) -> httpx.Response:
    """Of an app that has loaded no model, so without a server."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return anyio.run(send)


@pytest.fixture
def url(running: Callable[[str], Endpoint]) -> str:
    return running("sd-v1").url


def test_a_browser_gets_the_page(url: str) -> None:
    answer = requests.get(url, headers={"Accept": BROWSER}, timeout=5)
    assert (answer.status_code, answer.content) == (200, PAGE)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Vary"] == "Accept"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    policy = answer.headers["Content-Security-Policy"].split("; ")
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert not {word for entry in policy for word in entry.split()} & {
        "'unsafe-inline'",
        "'unsafe-eval'",
        "*",
        "https:",
    }
    head = requests.head(url, headers={"Accept": BROWSER}, timeout=5)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("accept", ["*/*", "text/plain", "application/json", "", None])
def test_whoever_asks_for_no_html_gets_what_a_probe_gets(url: str, accept: str | None) -> None:
    answer = requests.get(url, headers={"Accept": accept}, timeout=5)
    assert (answer.status_code, answer.text) == (200, "Ok")
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert "Content-Security-Policy" not in answer.headers


def test_the_page_is_at_the_root_alone_and_for_get(url: str) -> None:
    for path in ("/health", "/config", "/metrics"):
        assert "html" not in requests.get(url + path, headers={"Accept": BROWSER}, timeout=5).headers["Content-Type"]
    refused = requests.post(url, headers={"Accept": BROWSER}, timeout=5)
    assert refused.status_code == 400
    assert list(refused.json()) == ["error"]


def test_it_is_there_while_the_model_loads_and_the_probe_is_not() -> None:
    assert ask(build_app(), "GET", "/", Accept=BROWSER).content == PAGE
    assert ask(build_app(), "GET", "/").status_code == 503


def test_nothing_in_it_comes_from_elsewhere() -> None:
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
    def test_they_may_not_by_default(self, url: str) -> None:
        answer = requests.get(f"{url}/config", headers={"Origin": ORIGIN}, timeout=5)
        assert "Access-Control-Allow-Origin" not in answer.headers
        asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
        assert requests.options(f"{url}/decode", headers=asked, timeout=5).status_code == 403

    @pytest.mark.parametrize("allowed", [ORIGIN, "*"])
    def test_those_that_are_named_may(self, allowed: str) -> None:
        app = calling(allowed)
        preflight = ask(app, "OPTIONS", "/decode", Origin=ORIGIN, **PREFLIGHT)
        assert (preflight.status_code, preflight.headers["Access-Control-Allow-Origin"]) == (200, allowed)
        assert "authorization" in preflight.headers["Access-Control-Allow-Headers"].lower()
        answer = ask(app, "GET", "/config", Origin=ORIGIN)
        assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (503, allowed)
        assert answer.headers["Access-Control-Expose-Headers"].split(", ") == list(EXPOSED)
        assert "Access-Control-Allow-Credentials" not in answer.headers

    def test_others_may_not(self) -> None:
        app, other = calling(ORIGIN), "https://b.example"
        preflight = ask(app, "OPTIONS", "/decode", Origin=other, **PREFLIGHT)
        assert (preflight.status_code, list(preflight.json())) == (403, ["error"])
        assert "Access-Control-Allow-Origin" not in ask(app, "GET", "/config", Origin=other).headers

    def test_faults_of_ours_are_readable_too(self) -> None:
        app = calling(ORIGIN)
        app.state.handler = object()  # which has no pipeline
        answer = ask(app, "GET", "/health", Origin=ORIGIN)
        assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (500, ORIGIN)


@pytest.mark.parametrize("value", ["a.example", "https://a.example/page", "https://*.example", "null"])
def test_what_is_no_origin_is_refused_at_the_start(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_CORS_ORIGINS", value)
    with pytest.raises(ValueError, match=r"^VAE_CORS_ORIGINS: .*expected origins such as https://example.org"):
        Settings.load(tmp_path)


def test_origins_are_separated_by_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_CORS_ORIGINS", "https://A.example, http://localhost:3000,")
    assert Settings.load(tmp_path).cors_origins == ("https://a.example", "http://localhost:3000")
