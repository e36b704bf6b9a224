"""Fixtures for Debian's Chromium without a window: `make test-page`. The service runs in the tests' environment."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from scripts.local_server import serve

expect.set_options(timeout=120_000)  # a busy computer takes half a minute for one pass


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@dataclass
class Visit:
    """An open page, its errors and its requests."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)
    """Errors of the page's script and violations of its policy, without error responses."""
    hosts: set[str] = field(default_factory=set)
    """Hosts of the page's requests."""

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.goto(self.url)

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning") and "the server responded with a status of" not in message.text:
            self.errors.append(message.text)

    def choose(self, *files: Path) -> None:
        self.page.set_input_files("#file", files)

    def drop(self, file: Path, media_type: str) -> None:
        """Drop a file as a user drags it from the desktop."""
        script = """([data, name, type]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(data)], name, {type}));
            const target = document.getElementById("drop");
            for (const kind of ["dragover", "drop"]) {
                target.dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
            }
        }"""
        self.page.evaluate(script, [list(file.read_bytes()), file.name, media_type])

    def pixels(self, canvas: str) -> list[int]:
        """Return RGBA of a canvas, row by row."""
        script = """(id) => {
            const canvas = document.getElementById(id);
            return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
        }"""
        return self.page.evaluate(script, canvas)


@contextmanager
def visit(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """Open a page in a new tab. At the end it must have no errors and no requests to other hosts."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
    opened = Visit(context.new_page(), url)
    yield opened
    assert opened.errors == []
    assert len(opened.hosts - {""}) <= 1, opened.hosts
    context.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of a service with `tiny`."""
    with serve("--model", "tiny", "--device", "cpu", log=tmp_path_factory.mktemp("tiny") / "log") as url:
        yield url
