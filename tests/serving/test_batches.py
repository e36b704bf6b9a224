"""Tests of several images in one request and in one response, and of the encoder's moments."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import numpy as np
import pytest
import requests
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from handlers import MODELS
from handlers.serving.vae.autoencoder import PixelRange
from tests.serving.test_stop import CLASSES
from tests.support.checkpoints import model_for
from tests.support.endpoint import Endpoint, uint8_pixels
from tests.support.small_service import Service, as_tensor


def make_images(count: int = 3, size: tuple[int, int] = (96, 64)) -> list[Image.Image]:
    gradient = Image.radial_gradient("L").resize(size)
    return [Image.merge("RGB", [gradient.rotate(90 * turns + index) for turns in range(3)]) for index in range(count)]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def form(images: list[Image.Image]) -> list[Any]:
    return [("file", (f"{index}.png", png(image))) for index, image in enumerate(images)]


def post_form(endpoint: Endpoint, files: Any, path: str = "/encode", **more: Any) -> requests.Response:
    return requests.post(endpoint.url + path, files=files, timeout=60, **more)


class TestForm:
    """Tests of the forms that `curl -F file=@image.png`, `requests.post(files=...)` and a browser's FormData send."""

    @pytest.mark.parametrize("path", ["/encode", "/"])
    def test_a_batch_of_images(self, image_endpoint: Endpoint, path: str) -> None:
        images = make_images()
        latents = as_tensor(post_form(image_endpoint, form(images), path, params=image_endpoint.scaling))
        expected = image_endpoint.encoded(VaeImageProcessor().preprocess(images))
        torch.testing.assert_close(latents, expected.detach(), atol=1e-4, rtol=0)

    def test_fields_are_parameters(self, image_endpoint: Endpoint) -> None:
        actual = post_form(image_endpoint, form(make_images(1)), data={"do_scaling": "true", "sample_mode": "argmax"})
        other = post_form(image_endpoint, form(make_images(1)), params={"do_scaling": "true"})
        assert torch.equal(as_tensor(actual), as_tensor(other))

    def test_a_tensor(self, image_endpoint: Endpoint) -> None:
        latents = image_endpoint.latents()
        fields = {"shape": [str(size) for size in latents.shape], "dtype": "float32", "output_type": "pt"}
        response = post_form(image_endpoint, {"file": ("z", latents.numpy().tobytes())}, "/decode", data=fields)
        expected = image_endpoint.post(latents, "/decode", output_type="pt")
        assert torch.equal(as_tensor(response), as_tensor(expected))

    def test_a_video(self, video_endpoint: Endpoint) -> None:
        latents = video_endpoint.latents(frames=2)
        mp4 = video_endpoint.post(latents, output_type="mp4").content
        by_form = post_form(video_endpoint, {"file": ("video.mp4", mp4)})
        by_body = requests.post(video_endpoint.url + "/encode", data=mp4, timeout=60)
        assert torch.equal(as_tensor(by_form), as_tensor(by_body))

    @pytest.mark.parametrize(
        ("files", "fields", "status", "message"),
        [
            (form([*make_images(1), *make_images(1, (64, 64))]), {}, 422, "one size, but these have 96x64, 64x64"),
            ([("note", (None, "no file"))], {}, 400, "the form has no file"),
            (form(make_images(65, (8, 8))), {}, 413, "a batch of 65 images; at most 64"),
            ([*form(make_images(1)), ("b", ("b.txt", b"text"))], {}, 400, "the body is no PNG, JPEG, WebP or MP4 file"),
            (form(make_images(1)), {"x": ["1"] * 1100}, 413, "the form has more than 1000 parts"),
            (form(make_images(2)), {"shape": "1", "dtype": "uint8"}, 400, "the form has several files"),
        ],
    )
    def test_wrong_forms_are_refused(
        self, running: Any, files: Any, fields: dict[str, str], status: int, message: str
    ) -> None:
        response = post_form(running("sd-v1"), files, data=fields)
        assert response.status_code == status
        assert message in response.json()["error"]

    def test_several_files_for_a_video_model(self, video_endpoint: Endpoint) -> None:
        response = post_form(video_endpoint, form(make_images(2)))
        assert response.status_code == 422
        assert "a video model takes one file" in response.json()["error"]

    @pytest.mark.parametrize(
        ("content_type", "body"),
        [
            ("multipart/form-data", b"--x\r\n"),
            ("multipart/form-data; boundary=", b"--x\r\n"),
            ("multipart/form-data; boundary=x", b"--y\r\n\r\n"),
            ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: attachment\r\n\r\n1\r\n--x--\r\n"),
            ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; filename=a\r\n\r\n\x89PNG"),
            ("multipart/form-data; boundary=" + "x" * 300, b""),
        ],
    )
    def test_a_broken_form(self, running: Any, content_type: str, body: bytes) -> None:
        endpoint = running("sd-v1")
        response = requests.post(endpoint.url, data=body, headers={"Content-Type": content_type}, timeout=10)
        assert response.status_code == 400, response.text
        assert response.json()["error"]


class TestZip:
    @pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
    def test_zip_has_a_file_for_each_image(self, image_endpoint: Endpoint, image_format: str) -> None:
        latents = image_endpoint.latents(batch=11)
        parameters = {"image_format": image_format, **image_endpoint.scaling}
        response = image_endpoint.post(latents, "/decode", {"Accept": "application/zip"}, **parameters)
        assert response.headers["Content-Type"] == "application/zip"
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            assert archive.namelist() == [f"{index}.{image_format}" for index in range(11)]
            images = [np.asarray(Image.open(archive.open(name))) for name in archive.namelist()]
        expected = uint8_pixels(image_endpoint.decoded(latents))
        if image_format == "png":
            assert np.abs(np.stack(images).astype(int) - expected).max() <= 1  # a batch rounds differently
        assert np.stack(images).shape == expected.shape

    def test_zip_is_refused_for_a_video(self, video_endpoint: Endpoint) -> None:
        headers = {"Accept": "application/zip"}
        response = video_endpoint.post(video_endpoint.latents(), "/decode", headers, output_type="pil")
        assert response.status_code == 400
        assert "a video cannot be sent as images" in response.json()["error"]


@pytest.mark.parametrize("key", CLASSES)
@torch.no_grad()
def test_moments_are_the_encoder_output(service: Service, key: str) -> None:
    vae, about = service.model(key), requests.get(f"{service.url}/{key}/config", timeout=5).json()
    side = 2 * about["latents"]["vae_scale_factor"]
    video = about["kind"] == "video"
    # a clip of MiniMax-H3 begins with 5 frames; 9 would be cut
    frames = (about["pixels"]["frame_counts"][1 if about["latents"]["clip"] > 1 else 2],) if video else ()
    shape = (1, about["pixels"]["channels"], *frames, side, side)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if "moments" not in about["sample_modes"]:
        message = service.refusal(key, pixels, "encode", sample_mode="moments")
        assert "gives latents, no distribution" in message
        return
    moments = service.tensor(key, pixels, "encode", sample_mode="moments")
    if key.startswith("svd"):  # the model treats frames as images
        expected = vae.encode(pixels[0].movedim(1, 0)).latent_dist.parameters.movedim(0, 1)[None]
    else:
        own = PixelRange(model_for(key).pixel_statistics).to_own(pixels)
        expected = vae.encode(own.unsqueeze(2) if key.startswith("qwen-image") else own).latent_dist.parameters
    torch.testing.assert_close(moments, expected, atol=1e-5, rtol=1e-5)
    mode = service.tensor(key, pixels, "encode")
    torch.testing.assert_close(moments[:, : mode.shape[1]], mode, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", ["encode", ""])
@torch.no_grad()
def test_image_pixels_may_have_a_frame_dimension_of_1(service: Service, task: str) -> None:
    pixels = torch.rand((2, 3, 1, 32, 48), generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = service.model("qwen-image").encode(pixels).latent_dist.mode()
    torch.testing.assert_close(service.tensor("qwen-image", pixels, task), expected, atol=1e-5, rtol=1e-5)
    pixel_bytes = (pixels * 127.5 + 127.5).round().to(torch.uint8)
    expected = service.model("qwen-image").encode(pixel_bytes / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(service.tensor("qwen-image", pixel_bytes, task), expected, atol=1e-5, rtol=1e-5)


def test_pixels_with_two_frames_are_not_an_image(service: Service) -> None:
    message = service.refusal("qwen-image", torch.zeros(1, 3, 2, 32, 48), "encode")
    assert "expected [B, 3, height, width] or [B, 3, 1, height, width]" in message
    message = service.refusal("flux", torch.zeros(1, 3, 1, 32, 48), "encode")
    assert message.endswith("expected [B, 3, height, width]")


@pytest.mark.parametrize("more", [{"do_scaling": True}, {"scaling_factor": 2}, {"latents_layout": "packed"}])
def test_moments_are_never_scaled(service: Service, more: dict[str, Any]) -> None:
    message = service.refusal("flux", torch.zeros(1, 3, 64, 64), "encode", sample_mode="moments", **more)
    assert "moments are raw" in message


@torch.no_grad()
def test_channels_last_equals_the_model_bit_for_bit(service: Service) -> None:
    vae = service.model("sd-v1")
    pixels = torch.rand((1, 3, 64, 96), generator=torch.Generator().manual_seed(0)) * 2 - 1
    served = {
        name: service.tensor("sd-v1", pixels, "encode", memory_format=name, exact=True)
        for name in ("channels_last", None)
    }
    here = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
    assert torch.equal(served["channels_last"], here)
    assert torch.equal(served[None], vae.encode(pixels).latent_dist.mode())


class TestConfig:
    @pytest.mark.parametrize("key", CLASSES)
    def test_config_describes_the_model(self, service: Service, key: str) -> None:
        about = requests.get(f"{service.url}/{key}/config", timeout=5).json()
        vae = service.model(key)
        own = {name: value for name, value in vae.config.items() if not name.startswith("_")}
        stored = {name: value for name, value in about["vae_config"].items() if not name.startswith("_")}
        assert stored == json.loads(json.dumps(own))
        assert about["vae_class"] == type(vae).__name__
        assert (about["model"], about["dtype"]) == (key, "float32")
        assert str(service.folder) not in json.dumps({**about, "weights": None})
        buffers = dict(vae.named_buffers())
        for name, values in about["buffers"].items():
            assert torch.equal(torch.tensor(values, dtype=buffers[name].dtype), buffers[name])
        assert bool(about["buffers"]) == key.startswith(("flux2", "ltx"))

    @pytest.mark.parametrize(
        "key", [key for key in (*CLASSES, "flux", "flux2") if key in MODELS and not MODELS[key].takes_scaled]
    )
    def test_config_has_the_normalization_of_the_service(self, service: Service, key: str) -> None:
        """Check ``raw = scaled * std / factor + mean``, or ``scaled / factor + shift``."""
        about = requests.get(f"{service.url}/{key}/config", timeout=5).json()
        normalization, layouts = about["normalization"], about["latents"]
        time = (3,) if layouts["layout"] == "BCFHW" and about["kind"] == "video" else ()
        scaled = torch.randn((1, layouts["channels"], *time, 2, 2), generator=torch.Generator().manual_seed(0))
        more = {"latents_layout": layouts["layout"]} if about["kind"] == "video" else {}
        more |= {"normalized": True} if normalization["raw_layouts"] else {}
        if normalization["mean"] is None:
            raw = scaled / (normalization["factor"] or 1) + normalization["shift"]
        else:
            mean, std = (
                torch.tensor(normalization[name])[None].repeat(1, 1, 2, 2)[..., :2, :2] for name in ("mean", "std")
            )
            mean, std = (values.unsqueeze(2) if scaled.ndim == 5 else values for values in (mean, std))
            raw = scaled * std / (normalization["factor"] or 1) + mean
        options = {"output_type": "pt", **more}
        if about["vae_config"].get("timestep_conditioning"):
            options["decode_noise_scale"] = 0
        actual = service.tensor(key, scaled, "decode", do_scaling=True, **options)
        other = service.tensor(key, raw, "decode", **{**options, "normalized": None})
        torch.testing.assert_close(actual, other, atol=1e-4, rtol=1e-4)

    def test_config_requires_the_token(self, checkpoint: Any, tmp_path: Any) -> None:
        from scripts.local_server import serve

        arguments = ("--model", "sd-v1", "--weights", str(checkpoint("sd-v1")))
        with serve(*arguments, log=tmp_path / "log", API_TOKEN="a-token") as url:
            assert requests.get(url + "/config", timeout=5).status_code == 401
            headers = {"Authorization": "Bearer a-token"}
            about = requests.get(url + "/config", headers=headers, timeout=5).json()
        assert about["model"] == "sd-v1"
        assert "a-token" not in json.dumps(about)
