"""Take the screenshots of the web demo in docs/, with the VAE of this repository, in Chromium: `make screenshots`."""

from __future__ import annotations

import io
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
        save(page, "page.png")
        page = show(chromium, url, coffee, viewport={"width": 1180, "height": 900}, color_scheme="dark")
        page.get_by_text("Difference", exact=True).click()
        save(page, "page-dark.png")
        phone = {"is_mobile": True, "has_touch": True, "device_scale_factor": 1.5}
        page = show(chromium, url, None, viewport={"width": 390, "height": 844}, **phone)
        save(page, "page-narrow.png")
        chromium.close()
    print("Written to docs/: page.png, page-dark.png, page-narrow.png")


def save(page: Page, name: str) -> None:
    """Write what the page shows now, in 256 colors, which take half of the bytes."""
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256).save(DOCS / name, optimize=True)


def show(browser: Browser, url: str, file: Path | None, **options: Any) -> Page:
    """Open the web demo with its sample, or with a file twice: the first time warms the service up."""
    page = browser.new_page(**options)
    page.goto(url)
    for _ in range(2 if file else 1):
        page.set_input_files("#file", file) if file else page.click("#sample")
        expect(page.locator("#psnr")).to_contain_text("dB", timeout=120_000)
    return page


if __name__ == "__main__":
    main()
