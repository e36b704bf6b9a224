"""The pictures of the page in docs/: `make screenshots`. Takes them of the VAE in this repository, in Chromium."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from skimage import data

from scripts.local_server import ROOT, serve

DOCS = ROOT / "docs"


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    astronaut, coffee = folder / "astronaut.png", folder / "coffee.png"
    Image.fromarray(data.astronaut()).save(astronaut)
    Image.fromarray(data.coffee()).crop((0, 0, 600, 400)).save(coffee)
    with serve("--model", "tiny", "--device", "cpu", log=folder / "log") as url, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = show(chromium, url, astronaut, viewport={"width": 1180, "height": 1025})
        page.screenshot(path=DOCS / "page.png")
        page = show(chromium, url, coffee, viewport={"width": 1180, "height": 900}, color_scheme="dark")
        page.get_by_text("Difference", exact=True).click()
        page.screenshot(path=DOCS / "page-dark.png")
        page = show(chromium, url, coffee, viewport={"width": 390, "height": 844}, device_scale_factor=2)
        page.screenshot(path=DOCS / "page-narrow.png")
        chromium.close()
    print("Written to docs/: page.png, page-dark.png, page-narrow.png")


def show(browser: Browser, url: str, file: Path, **options: Any) -> Page:
    """The page once the file is encoded and decoded; the first time warms the service up."""
    page = browser.new_page(**options)
    page.goto(url)
    for _ in range(2):
        page.set_input_files("#file", file)
        expect(page.locator("#psnr")).to_contain_text("dB", timeout=120_000)
    return page


if __name__ == "__main__":
    main()
