"""Tests of the web demo at the endpoint's root, in a browser: a user's input and its results."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect
from safetensors import safe_open
from safetensors.torch import save_file

from handlers.serving.media.output import write_mp4
from scripts.local_server import ROOT, serve
from tests.page.conftest import Visit, visit
from tests.remote_vae.test_proxy import proxy
from tests.support.checkpoints import model_for
from tests.support.endpoint import Endpoint, faulty_endpoint, same_video
from tests.support.faulty_server import THIRD_CHUNK_SLOW
from tests.support.small_service import SERVED, Service

TOKEN = "a-token-of-this-test"
TIMES = "\N{MULTIPLICATION SIGN}"
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory, photograph: Image.Image) -> Path:
    """Save an image of 96x64 pixels, which the VAE takes without a resize."""
    file = tmp_path_factory.mktemp("image") / "astronaut.png"
    photograph.save(file)
    return file


def through_the_api(
    url: str, file: Path, scaled: bool = True, headers: dict[str, str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Encode an image to latents [1, C, h, w], normalized or raw, and decode them to pixels [H, W, 3]."""
    parameters = {"output_dtype": "float32", "do_scaling": scaled}
    encoded = requests.post(f"{url}/encode", file.read_bytes(), params=parameters, headers=headers, timeout=30)
    shape = json.loads(encoded.headers["shape"])
    parameters = {"shape": shape, "dtype": "float32", "image_format": "png", "do_scaling": scaled}
    decoded = requests.post(f"{url}/decode", encoded.content, params=parameters, headers=headers, timeout=30)
    latents = np.frombuffer(encoded.content, np.float32).reshape(shape)
    return latents, np.asarray(Image.open(io.BytesIO(decoded.content)))


def download(opened: Visit, button: str) -> tuple[str, bytes]:
    """Return the name and the content of the file that a button saves."""
    with opened.page.expect_download() as saved:
        opened.page.click(button)
    return saved.value.suggested_filename, saved.value.path().read_bytes()


def as_array(pixels: list[int], height: int, width: int) -> np.ndarray:
    return np.array(pixels, np.uint8).reshape(height, width, 4)[..., :3]


def toolkit(folder: Path) -> AbstractContextManager[str]:
    """Serve `tiny` in the Inference Toolkit, or its stand-in."""
    command = ("-m", "tests.support.faulty_server", "toolkit")
    environment = {"TOOLKIT": os.environ["TOOLKIT"]} if "TOOLKIT" in os.environ else {}
    weights = str(ROOT / "models" / "tiny")
    return serve("--model", "tiny", "--weights", weights, log=folder / "log", command=command, **environment)


class TestImage:
    def test_a_dropped_image_gives_the_results_of_the_api(self, browser: Browser, tiny: str, image: Path) -> None:
        latents, expected = through_the_api(tiny, image)
        original = np.asarray(Image.open(image))
        with visit(browser, tiny) as opened:
            expect(opened.page.locator("#about")).to_contain_text("tiny · AutoencoderKL · float32 on cpu")
            opened.drop(image, "image/png")
            psnr = 10 * np.log10(255**2 / ((original.astype(float) - expected) ** 2).mean())
            expect(opened.page.locator("#psnr")).to_have_text(f"{psnr:.2f} dB")
            assert np.array_equal(as_array(opened.pixels("decoded"), 64, 96), expected)
            assert np.array_equal(as_array(opened.pixels("original"), 64, 96), original)
            gap = np.minimum(np.abs(original.astype(int) - expected) * 8, 255)
            assert np.array_equal(as_array(opened.pixels("difference"), 64, 96), gap)
            expect(opened.page.locator("#channels canvas")).to_have_count(8)
            expect(opened.page.locator("#shape")).to_have_text(f"Latents: 8 channels of 16 {TIMES} 24")
            for card in ("#encoding", "#decoding"):
                for phase in ("VAE", "reading the request", "waiting in the queue", "writing the response", "total"):
                    expect(opened.page.locator(card)).to_contain_text(phase)
            expect(opened.page.locator("#encoding")).to_contain_text(f"{latents.nbytes / 1000:.1f} kB")
            expect(opened.page.locator("#facts")).to_contain_text("6 to 1")
            name, saved = download(opened, "#save-npy")
            assert name == "astronaut-latents.npy"
            assert np.array_equal(np.load(io.BytesIO(saved)), latents)
            name, saved = download(opened, "#save-decoded")
            assert name == "astronaut-decoded.png"
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(saved))), expected)

    def test_a_sample_needs_no_file(self, browser: Browser, tiny: str) -> None:
        with visit(browser, tiny) as opened:
            opened.page.click("text=Try a sample image")
            expect(opened.page.locator("#psnr")).to_contain_text("dB")
            expect(opened.page.locator("#facts")).to_contain_text(f"512 {TIMES} 512")
            assert float(opened.page.locator("#psnr").text_content().removesuffix(" dB")) > 25
            assert as_array(opened.pixels("original"), 512, 512).std() > 40

    @pytest.mark.slow
    def test_under_the_toolkit(self, browser: Browser, image: Path, tmp_path: Path) -> None:
        with toolkit(tmp_path) as url, visit(browser, url) as opened:
            opened.choose(image)
            expect(opened.page.locator("#psnr")).to_contain_text("dB")
            expect(opened.page.locator("#decoding")).to_contain_text("VAE")

    def test_unsupported_sizes_and_formats_are_converted(self, browser: Browser, tiny: str, tmp_path: Path) -> None:
        Image.linear_gradient("L").resize((1500, 77)).convert("RGB").save(tmp_path / "wide.gif")
        with visit(browser, tiny) as opened:
            opened.choose(tmp_path / "wide.gif")
            expect(opened.page.locator("#psnr")).to_contain_text("dB")
            expect(opened.page.locator("#facts")).to_contain_text(f"1024 {TIMES} 52")

    def test_the_slider_and_the_views_by_keyboard(self, browser: Browser, tiny: str, image: Path) -> None:
        with visit(browser, tiny) as opened:
            page = opened.page
            expect(page.locator("#api")).to_be_visible()  # with the service's configuration, the last part to load
            assert [press(page, "Tab") for _ in range(2)] == ["api", "file"]  # where the browser's own dialog opens
            opened.choose(image)
            expect(page.locator("#psnr")).to_contain_text("dB")
            visited = [press(page, "Tab") for _ in range(8)]
            assert {"view", "slider"} <= set(visited), visited
            page.focus("#slider")
            for _ in range(10):
                page.keyboard.press("ArrowRight")
            assert page.evaluate("document.getElementById('stage').style.getPropertyValue('--at')") == "55%"
            page.keyboard.press("End")
            clip = "getComputedStyle(document.getElementById('decoded')).clipPath"
            assert page.evaluate(clip) == "inset(0px 0px 0px 100%)"
            page.focus("[name=view][value=compare]")
            page.keyboard.press("ArrowRight")
            expect(page.locator("#difference")).to_be_visible()
            expect(page.locator("#decoded")).to_be_hidden()
            x, y = (page.locator("#stage").bounding_box()[side] + 20 for side in "xy")
            assert page.evaluate("([x, y]) => document.elementFromPoint(x, y).id", [x, y]) == "difference"
            assert outline(page) != "none"


def eventually(page: Page, script: str) -> object:
    """Return the first true value of a script. The page's policy forbids playwright's own wait, an eval of text."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if value := page.evaluate(script):
            return value
        time.sleep(0.01)
    raise AssertionError(script)


def press(page: Page, key: str) -> str:
    page.keyboard.press(key)
    return page.evaluate("document.activeElement.id || document.activeElement.name || document.activeElement.tagName")


def outline(page: Page) -> str:
    """Return the outline of the focused element, or of the element after it."""
    return page.evaluate(
        "getComputedStyle(document.activeElement.nextElementSibling ?? document.activeElement).outlineStyle"
    )


class TestErrors:
    def test_errors_are_the_services_texts(self, browser: Browser, tiny: str, tmp_path: Path) -> None:
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
        message = requests.post(f"{tiny}/encode", data=broken.read_bytes(), timeout=30).json()["error"]
        with visit(browser, tiny) as opened:
            opened.choose(broken)
            expect(opened.page.locator("#error")).to_have_text(message)
            expect(opened.page.locator("#result")).to_be_hidden()

    def test_the_next_file_clears_the_error(self, browser: Browser, tiny: str, image: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "z.npy", np.zeros((1, 5, 8, 8), np.float32))
        with visit(browser, tiny) as opened:
            opened.choose(tmp_path / "z.npy")
            expect(opened.page.locator("#error")).to_contain_text("is no shape of this VAE's latents")
            opened.choose(image)
            expect(opened.page.locator("#psnr")).to_contain_text("dB")
            expect(opened.page.locator("#error")).to_be_hidden()

    def test_an_unreachable_service(self, browser: Browser, tiny: str, image: Path) -> None:
        with visit(browser, tiny) as opened:
            expect(opened.page.locator("#about")).to_contain_text("tiny")
            opened.page.route("**/encode*", lambda route: route.abort())
            opened.choose(image)
            expect(opened.page.locator("#error")).to_have_text("The service cannot be reached.")
            opened.errors.clear()

    def test_escape_cancels_a_run(self, browser: Browser, tiny: str, image: Path) -> None:
        with visit(browser, tiny) as opened:
            expect(opened.page.locator("#about")).to_contain_text("tiny")
            opened.page.route("**/encode*", lambda route: None)
            opened.choose(image)
            expect(opened.page.locator("#cancel")).to_be_visible()
            opened.page.keyboard.press("Escape")
            expect(opened.page.locator("#doing")).to_have_text("Cancelled.")

    def test_the_web_demo_waits_while_the_model_loads(self, browser: Browser, tiny: str) -> None:
        with visit(browser, "about:blank") as opened:
            responses = iter([{"status": 503, "json": {"error": "the model is loading"}}, None])

            def respond(route: Route) -> None:
                response = next(responses)
                route.fulfill(**response) if response else route.continue_()

            opened.page.route("**/config", respond)
            opened.page.goto(tiny)
            expect(opened.page.locator("#doing")).to_have_text("the model is loading")
            expect(opened.page.locator("#about")).to_contain_text("tiny")


def test_a_token_is_requested_and_kept_for_the_tab(
    browser: Browser, checkpoint: Callable[[str], Path], image: Path, tmp_path: Path
) -> None:
    weights = str(checkpoint("sd-v1"))
    with serve("--model", "sd-v1", "--weights", weights, log=tmp_path / "log", API_TOKEN=TOKEN) as url:
        with visit(browser, url) as opened:
            page = opened.page
            expect(page.locator("#access")).to_contain_text("the value of API_TOKEN")
            expect(page.locator("#access")).to_contain_text("stays in this browser tab")
            expect(page.locator("#error")).to_be_hidden()
            expect(page.locator("#token")).to_be_focused()
            page.keyboard.type("another")
            page.keyboard.press("Enter")
            expect(page.locator("#error")).to_have_text("The service did not accept this token.")
            expect(page.locator("#token")).to_be_focused()
            page.keyboard.type(TOKEN)
            page.keyboard.press("Enter")
            expect(page.locator("#about")).to_contain_text("sd-v1")
            expect(page.locator("#access")).to_be_hidden()
            page.reload()
            opened.choose(image)
            expect(page.locator("#psnr")).to_contain_text("dB")
            stored = page.evaluate("[JSON.stringify(localStorage), document.cookie, sessionStorage.getItem('token')]")
            assert stored == ["{}", "", TOKEN]
        with visit(browser, url) as second:
            expect(second.page.locator("#token")).to_be_visible()


class TestSavedLatents:
    @pytest.mark.parametrize("save", ["#save-npy", "#save-safetensors"])
    def test_saved_latents_give_the_same_image(
        self, browser: Browser, tiny: str, image: Path, tmp_path: Path, save: str
    ) -> None:
        with visit(browser, tiny) as opened:
            opened.choose(image)
            expect(opened.page.locator("#psnr")).to_contain_text("dB")
            _, direct = download(opened, "#save-decoded")
            name, content = download(opened, save)
            (tmp_path / name).write_bytes(content)
            opened.choose(tmp_path / name)
            expect(opened.page.locator("#facts")).to_contain_text(f"96 {TIMES} 64")
            expect(opened.page.locator("#values option:checked")).to_have_text("normalized, as pipelines give them")
            assert download(opened, "#save-decoded")[1] == direct

    @pytest.mark.parametrize("save", ["#save-npy", "#save-safetensors"])
    @pytest.mark.parametrize("key", SERVED)
    def test_saved_latents_of_every_model(
        self, browser: Browser, service: Service, image: Path, tmp_path: Path, key: str, save: str
    ) -> None:
        """Test models with every kind of factors, mean and deviation, and with pipelines that return raw latents."""
        is_video, frames = model_for(key).kind == "video", 22 if key == "minimax-h3" else 16  # it decodes no fewer
        with visit(browser, f"{service.url}/{key}/") as opened:
            opened.choose(save_clip(tmp_path / "clip.mp4", frames, height=64) if is_video else image)
            expect(opened.page.locator("#facts")).to_contain_text("memory mode")
            _, direct = download(opened, "#save-decoded")
            name, content = download(opened, save)
            (tmp_path / name).write_bytes(content)
            opened.choose(tmp_path / name)
            expect(opened.page.locator("#facts")).to_contain_text("memory mode")
            _, again = download(opened, "#save-decoded")
            assert same_video(again, direct) if is_video else again == direct

    @pytest.mark.parametrize("key", ["sdxl", "flux2", "wan-2.1", "ltx-2"])
    def test_saved_latents_equal_those_of_a_pipeline(
        self, browser: Browser, service: Service, image: Path, tmp_path: Path, key: str
    ) -> None:
        """Test that latents are normalized, or raw if the model's own pipeline returns raw ones in this layout.

        The metadata tells which.
        """
        raw = key in ("flux2", "ltx-2")
        with visit(browser, f"{service.url}/{key}/") as opened:
            opened.choose(image)
            expect(opened.page.locator("#facts")).to_contain_text("memory mode")
            _, content = download(opened, "#save-safetensors")
        (tmp_path / "z.safetensors").write_bytes(content)
        with safe_open(tmp_path / "z.safetensors", "pt") as file:
            latents, about = file.get_tensor("latents"), file.metadata()
        unit = model_for(key).vae_scale_factor
        size = [side // unit * unit for side in (96, 64)]
        sent = io.BytesIO()
        Image.open(image).resize(size).save(sent, "PNG")
        parameters = {"output_dtype": "float32", "do_scaling": not raw}
        encoded = requests.post(f"{service.url}/{key}/encode", sent.getvalue(), params=parameters, timeout=60)
        expected = torch.frombuffer(bytearray(encoded.content), dtype=torch.float32)
        assert torch.equal(latents.flatten(), expected)
        assert about["normalized"] == str(not raw).lower()


def test_a_transparent_image(browser: Browser, service: Service, tmp_path: Path) -> None:
    """Test that transparency is encoded, decoded and shown on a checkerboard, and that other models get white."""
    pixels = np.full((64, 64, 4), 200, np.uint8)
    pixels[:, 32:, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    for key in ("qwen-image-2.1", "qwen-image-layered", "qwen-image"):
        if key not in SERVED:  # with an older diffusers
            continue
        with visit(browser, f"{service.url}/{key}/") as opened:
            opened.choose(tmp_path / "clear.png")
            expect(opened.page.locator("#facts")).to_contain_text("memory mode")
            expect(opened.page.locator("#psnr")).to_contain_text("dB")
            _, content = download(opened, "#save-decoded")
            alpha = "document.querySelector('#original').getContext('2d').getImageData(48, 32, 1, 1).data[3]"
            checkered = opened.page.locator("#stage.checkered").count()
            mode = Image.open(io.BytesIO(content)).mode
            expected = ("RGB", 255, 0) if key == "qwen-image" else ("RGBA", 0, 1)
            assert (mode, opened.page.evaluate(alpha), checkered) == expected


def test_another_origin_may_not_call(browser: Browser, tiny: str) -> None:
    """Test another host, with and without a preflight request. A link to the service works."""
    call = "([url, mode]) => fetch(url, {method: 'POST', mode, body: 'x'}).then(() => 'sent', () => 'blocked')"

    def refused() -> float:
        lines = requests.get(f"{tiny}/metrics", timeout=10).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if "vae_requests_total" in line and 'status="403"' in line)

    second = browser.new_page()
    second.goto(tiny.replace("127.0.0.1", "localhost") + "/health")
    before = refused()
    assert second.evaluate(call, [f"{tiny}/decode", "no-cors"]) == "sent"
    assert second.evaluate(call, [f"{tiny}/decode", "cors"]) == "blocked"
    assert refused() == before + 2
    second.evaluate("url => { location = url }", tiny)
    expect(second.locator("#about")).to_contain_text("tiny")
    second.close()


def save_comfyui(latents: torch.Tensor, file: Path) -> None:
    """Save latents as ComfyUI's node Save Latent does."""
    save_file({"latent_tensor": latents, "latent_format_version_0": torch.tensor([])}, file)


class TestLatents:
    @pytest.mark.parametrize("name", ["z.npy", "half.npy", "z.safetensors", "bfloat.safetensors", "z.latent"])
    def test_a_file_is_decoded_as_by_the_api(
        self, browser: Browser, tiny: str, image: Path, tmp_path: Path, name: str
    ) -> None:
        latents, decoded = through_the_api(tiny, image, scaled=False)
        file = tmp_path / name
        if name == "z.npy":
            np.save(file, latents)
        elif name == "half.npy":
            np.save(file, latents.astype(np.float16))
        elif name == "z.latent":
            save_comfyui(torch.from_numpy(latents.copy()), file)
        else:
            dtype = torch.bfloat16 if "bfloat" in name else torch.float32
            save_file({"latents": torch.from_numpy(latents.copy()).to(dtype)}, file)
        with visit(browser, tiny) as opened:
            opened.drop(file, "")
            expect(opened.page.locator("#facts")).to_contain_text(f"96 {TIMES} 64")
            chosen = "raw" if name == "z.latent" else "normalized"
            expect(opened.page.locator("#values option:checked")).to_contain_text(chosen)
            expect(opened.page.locator("#reading")).to_contain_text(f"Standard deviation {latents.std():.2f}")
            if chosen != "raw":
                with opened.page.expect_response("**/decode*"):
                    opened.page.select_option("#values", "raw")
            expect(opened.page.locator("#facts")).to_contain_text(f"96 {TIMES} 64")
            shown = as_array(opened.pixels("decoded"), 64, 96)
            assert np.abs(shown.astype(int) - decoded).mean() < (0.01 if name.startswith("z") else 2)
            expect(opened.page.locator("#channels canvas")).to_have_count(8)
            expect(opened.page.locator("#slider")).to_be_hidden()

    def test_comfyuis_range_is_the_models(self, browser: Browser, service: Service, tmp_path: Path) -> None:
        """Test ComfyUI's latents of FLUX.2, which are normalized patches, and a tiny VAE, which takes no raw ones."""
        patches = torch.randn(1, 128, 4, 6, generator=torch.Generator().manual_seed(0))
        save_comfyui(patches, tmp_path / "z.latent")
        for key in ("flux2", "taef2"):
            expected = service.tensor(
                key, patches, "decode", do_scaling=True, output_type="pt", partial_postprocess=True
            )
            with visit(browser, f"{service.url}/{key}/") as opened:
                opened.choose(tmp_path / "z.latent")
                expect(opened.page.locator("#facts")).to_contain_text(f"96 {TIMES} 64")
                assert np.array_equal(as_array(opened.pixels("decoded"), 64, 96), expected[0].numpy())
        with visit(browser, f"{service.url}/taesd/") as opened:
            opened.choose(tmp_path / "z.latent")
            expect(opened.page.locator("#error")).to_contain_text(
                "of ComfyUI, whose latents are those of the large VAE"
            )

    def test_packed_and_normalized_latents(self, browser: Browser, tiny: str, tmp_path: Path) -> None:
        packed = torch.randn(1, 96, 32, generator=torch.Generator().manual_seed(0))
        save_file({"z": packed}, tmp_path / "packed.safetensors")
        parameters = {"shape": [1, 96, 32], "dtype": "float32", "height": 64, "width": 96, "do_scaling": "true"}
        response = requests.post(
            f"{tiny}/decode", packed.numpy().tobytes(), params={**parameters, "image_format": "png"}, timeout=30
        )
        with visit(browser, tiny) as opened:
            opened.choose(tmp_path / "packed.safetensors")
            expect(opened.page.locator("#error")).to_contain_text("packed")
            opened.page.fill("#height", "64")
            opened.page.fill("#width", "96")
            opened.page.keyboard.press("Enter")
            expect(opened.page.locator("#facts")).to_contain_text(f"96 {TIMES} 64")
            shown = as_array(opened.pixels("decoded"), 64, 96)
            assert np.array_equal(shown, np.asarray(Image.open(io.BytesIO(response.content))))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("text.npy", b"hello", "text.npy cannot be read: it is no .npy file"),
            ("headless.npy", b"\x93NUMPY\1\0\2\0{}", "headless.npy cannot be read: its header is malformed"),
            ("short.safetensors", b"\1", "short.safetensors cannot be read: it is cut short"),
            ("list.safetensors", struct.pack("<Q", 4) + b"null", "list.safetensors cannot be read: its header is"),
            ("long.safetensors", struct.pack("<Q", 2**40) + b"{}", "it is no .safetensors file, or cut short"),
            ("none.safetensors", struct.pack("<Q", 2) + b"{}", "it must hold one tensor, and holds none"),
        ],
    )
    def test_a_file_without_latents(
        self, browser: Browser, tiny: str, tmp_path: Path, name: str, content: bytes, message: str
    ) -> None:
        (tmp_path / name).write_bytes(content)
        with visit(browser, tiny) as opened:
            opened.choose(tmp_path / name)
            expect(opened.page.locator("#error")).to_contain_text(message)


@pytest.fixture(scope="module")
def video(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Return an endpoint whose third chunk takes seconds if the request has THIRD_CHUNK_SLOW."""
    log = tmp_path_factory.mktemp("video") / "log"
    weights = checkpoint("hunyuan-video")
    with faulty_endpoint("standalone", "hunyuan-video", weights, log, DEVICE_SECONDS="3") as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save 37 frames of 64x48 pixels."""
    return save_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 37)


def save_clip(file: Path, frames: int, height: int = 48) -> Path:
    gradient = np.asarray(Image.linear_gradient("L").resize((64, height)).convert("RGB"))
    file.write_bytes(write_mp4(np.stack([np.roll(gradient, frame, 1) for frame in range(frames)]), 10))
    return file


WATCH = """() => {
    const video = document.getElementById("video");
    video.addEventListener("loadeddata", () => {
        window.first = [document.getElementById("progress").textContent, video.buffered.start(0), video.buffered.end(0),
                        video.videoWidth, video.videoHeight];
    }, {once: true});
}"""
"""Script that records the state at the first visible frame."""


class TestVideo:
    def test_a_video_plays_while_it_arrives(self, browser: Browser, video: Endpoint, clip: Path) -> None:
        with visit(browser, video.url) as opened:
            page = opened.page
            page.route("**/decode*", lambda route: route.continue_(url=f"{route.request.url}&seed={THIRD_CHUNK_SLOW}"))
            expect(page.locator("#invitation")).to_contain_text("Drop a video")
            page.evaluate(WATCH)
            opened.choose(clip)
            expect(page.locator("#progress")).to_have_text("decoded")
            progress, *seen = eventually(page, "window.first")
            assert "so far" in progress
            assert seen[0] == 0
            assert 0 < seen[1] < 1.5
            assert seen[2:] == [64, 48]
            length = "isFinite(document.getElementById('video').duration) && document.getElementById('video').duration"
            assert eventually(page, length) == pytest.approx(37 / 24, abs=0.02)
            expect(page.locator("#facts")).to_contain_text("first bytes after")
            expect(page.locator("#decoding")).to_contain_text("until the first bytes")
            expect(page.locator("#decoding")).to_contain_text("from the first byte to the last")
            expect(page.locator("#channels canvas")).to_have_count(16)

    def test_without_media_source_the_whole_file_is_shown(self, browser: Browser, video: Endpoint, clip: Path) -> None:
        with visit(browser, "about:blank") as opened:
            opened.page.add_init_script("delete window.MediaSource; delete window.ManagedMediaSource;")
            opened.page.goto(video.url)
            opened.choose(clip)
            expect(opened.page.locator("#progress")).to_have_text("decoded")
            eventually(opened.page, "document.getElementById('video').readyState >= 2")
            assert opened.page.evaluate("document.getElementById('video').src").startswith("blob:")

    def test_latents_and_an_image(self, browser: Browser, video: Endpoint, image: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "z.npy", video.latents(frames=3, height=48, width=64).numpy())
        with visit(browser, video.url) as opened:
            opened.choose(tmp_path / "z.npy")
            expect(opened.page.locator("#progress")).to_have_text("decoded")
            expect(opened.page.locator("#before")).to_be_hidden()
            opened.choose(image)
            expect(opened.page.locator("#psnr")).to_contain_text("dB")
            expect(opened.page.locator("#videos")).to_be_hidden()

    def test_a_broken_video(self, browser: Browser, video: Endpoint, tmp_path: Path) -> None:
        (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(100))
        with visit(browser, video.url) as opened:
            opened.choose(tmp_path / "broken.mp4")
            expect(opened.page.locator("#error")).to_contain_text("video")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of a service of two models with random weights."""
    log = tmp_path_factory.mktemp("two") / "log"
    with serve("--model", "tiny,taesd", "--weights", "random", "--device", "cpu", log=log) as url:
        yield url


class TestSeveralModels:
    @pytest.mark.parametrize("path", ["", "/", "/tiny", "/tiny/", "/taesd", "/taesd/", "/taesd?a=b#c"])
    def test_the_address_selects_the_model(self, browser: Browser, two: str, image: Path, path: str) -> None:
        with visit(browser, two + path) as opened:
            opened.choose(image)
            expect(opened.page.locator("#psnr")).to_contain_text("dB")
            expected = "AutoencoderTiny" if "taesd" in path else "AutoencoderKL "
            expect(opened.page.locator("#about")).to_contain_text(expected)
            expect(opened.page.locator("#channels canvas")).to_have_count(4 if "taesd" in path else 8)

    def test_through_a_proxy(self, browser: Browser, two: str, image: Path, tmp_path: Path) -> None:
        with proxy(two, tmp_path) as url, visit(browser, f"{url}/taesd") as opened:
            opened.choose(image)
            expect(opened.page.locator("#psnr")).to_contain_text("dB")
            expect(opened.page.locator("#channels canvas")).to_have_count(4)

    def test_a_new_choice_of_model_runs_the_same_image_again(self, browser: Browser, two: str, image: Path) -> None:
        with visit(browser, two) as opened:
            page = opened.page
            opened.choose(image)
            expect(page.locator("#channels canvas")).to_have_count(8)
            assert page.locator("#model option").all_text_contents() == ["tiny", "taesd"]
            page.select_option("#model", "taesd")
            expect(page.locator("#channels canvas")).to_have_count(4)
            expect(page.locator("#psnr")).to_contain_text("dB")

    def test_a_models_name_appears_once(self, browser: Browser, two: str, tiny: str) -> None:
        with visit(browser, two) as opened:
            expect(opened.page.locator("#about")).to_contain_text("AutoencoderKL")
            assert "tiny" not in opened.page.locator("#about").text_content()
        with visit(browser, tiny) as opened:
            expect(opened.page.locator("#about")).to_contain_text("tiny")
            expect(opened.page.locator("#model")).to_be_hidden()


class TestJavaScript:
    """Tests of the example in docs/http-api.md."""

    SNIPPET = re.search(r"```js\n(.*?)```", (ROOT / "docs" / "http-api.md").read_text(), re.DOTALL)[1]
    RUN = """async (data) => {
        %s
        const latents = await encode(new Blob([Uint8Array.from(data)]));
        const image = new Uint8Array(await (await decode(latents)).arrayBuffer());
        const refused = await decode({...latents, shape: [1, 2, 3]}).catch((error) => error.message);
        return {shape: latents.shape, values: [...latents.values], image: [...image], refused};
    }"""

    @pytest.mark.slow
    @pytest.mark.parametrize("token", ["", TOKEN])
    def test_an_image_makes_a_round_trip(self, browser: Browser, image: Path, tmp_path: Path, token: str) -> None:
        protected = {"API_TOKEN": token} if token else {}
        with serve("--model", "tiny", "--device", "cpu", log=tmp_path / "log", **protected) as url:
            script = self.SNIPPET.replace("http://127.0.0.1:8000", url).replace('TOKEN = ""', f'TOKEN = "{token}"')
            with visit(browser, url) as opened:
                got = opened.page.evaluate(self.RUN % script, list(image.read_bytes()))
            latents, expected = through_the_api(url, image, headers={"Authorization": f"Bearer {token}"})
        assert got["shape"] == list(latents.shape)
        assert np.array_equal(np.array(got["values"], np.float32), latents.flatten())
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(bytes(got["image"])))), expected)
        assert "is 24 bytes, but" in got["refused"]


class TestLayout:
    def test_a_narrow_screen_needs_no_horizontal_scrolling(self, browser: Browser, tiny: str, image: Path) -> None:
        with visit(browser, tiny, **PHONE) as opened:
            page = opened.page
            opened.choose(image)
            expect(page.locator("#psnr")).to_contain_text("dB")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            selectors = ("#stage", "#quality", "#latents", "#encoding", "#decoding")
            stage, *below = (page.locator(selector).bounding_box() for selector in selectors)
            tops = [stage["y"] + stage["height"], *(box["y"] for box in below)]
            assert tops == sorted(tops)
            assert stage["width"] > 290
            page.touchscreen.tap(stage["x"] + stage["width"] * 0.8, stage["y"] + stage["height"] / 2)
            at = page.evaluate("parseFloat(document.getElementById('stage').style.getPropertyValue('--at'))")
            assert at == pytest.approx(80, abs=3)

    def test_a_phone_shows_input_and_result_on_its_first_screen(self, browser: Browser, tiny: str) -> None:
        with visit(browser, tiny, **{**PHONE, "viewport": {"width": 390, "height": 844}}) as opened:
            page = opened.page
            expect(page.locator("#invitation")).to_have_text("choose a file", use_inner_text=True, ignore_case=True)
            page.tap("#sample")
            expect(page.locator("#psnr")).to_contain_text("dB")
            selectors = ("#drop", "#stage", "#psnr")
            boxes = [page.locator(selector).bounding_box() for selector in selectors]
            edges = [edge for box in boxes for edge in (box["y"], box["y"] + box["height"])]
            assert edges == sorted(edges)
            assert edges[-1] <= 844

    def test_the_latents_form_fits_a_narrow_screen(self, browser: Browser, service: Service, tmp_path: Path) -> None:
        np.save(tmp_path / "z.npy", np.zeros((1, 32, 8, 8), np.float32))
        with visit(browser, f"{service.url}/flux2/", **PHONE) as opened:
            opened.choose(tmp_path / "z.npy")
            expect(opened.page.locator("#facts")).to_contain_text("image")
            expect(opened.page.locator("#reading")).to_be_visible()
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_has_enough_contrast(self, browser: Browser, tiny: str, image: Path, scheme: str) -> None:
        with visit(browser, tiny, color_scheme=scheme) as opened:
            page = opened.page
            opened.choose(image)
            expect(page.locator("#psnr")).to_contain_text("dB")
            grounds = {
                selector: color(page, selector, "backgroundColor") for selector in ("body", "#quality", "#error")
            }
            assert (sum(grounds["body"]) > 600) == (scheme == "light")
            for text, ground in (
                ("body", "body"),
                ("#about", "body"),
                ("#quality dt", "#quality"),
                ("#psnr", "#quality"),
                ("#error", "#error"),
            ):
                assert contrast(color(page, text, "color"), grounds[ground]) >= 4.5, text


def color(page: Page, selector: str, name: str) -> list[float]:
    style = page.evaluate("([s, name]) => getComputedStyle(document.querySelector(s))[name]", [selector, name])
    return [float(value) for value in re.findall(r"[\d.]+", style)[:3]]


def contrast(first: list[float], second: list[float]) -> float:
    """Return the contrast as WCAG 2.2 defines it."""

    def luminance(color: list[float]) -> float:
        linear = [(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in color]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
