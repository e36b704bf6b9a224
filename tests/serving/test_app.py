"""Tests of the service over HTTP, with the client of diffusers and with raw requests, against diffusers itself."""

import asyncio
import base64
import io
import json
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import requests
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode, remote_encode
from diffusers.video_processor import VideoProcessor
from PIL import Image
from starlette.applications import Starlette

from handlers.serving.http.app import build_app
from handlers.serving.media.output import tensor_bytes
from tests.support.endpoint import Endpoint, uint8_pixels
from tests.support.values import TOLERANCE, assert_same


# `test_several` and `test_limits` have requests to `sd-v1`.
@pytest.fixture
def image_endpoint(running: Callable[[str], Endpoint]) -> Endpoint:
    return running("flux")


@pytest.fixture(params=["flux", "hunyuan-video"])
def endpoint(request: pytest.FixtureRequest, running: Callable[[str], Endpoint]) -> Endpoint:
    return running(request.param)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Pack [B, C, H, W] into 2x2 patches, as `FluxPipeline._pack_latents` does."""
    batch, channels, height, width = latents.shape
    latents = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return latents.reshape(batch, (height // 2) * (width // 2), channels * 4)


def as_array(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))


def as_tensor(response: requests.Response) -> torch.Tensor:
    dtype = getattr(torch, response.headers["dtype"])
    return torch.frombuffer(bytearray(response.content), dtype=dtype).reshape(json.loads(response.headers["shape"]))


class TestDecode:
    """Tests of each row of the decode table."""

    def test_png_equals_diffusers_pixel_for_pixel(self, image_endpoint: Endpoint) -> None:
        latents = image_endpoint.latents()
        image = remote_decode(image_endpoint.url, latents, image_format="png", **image_endpoint.scaling)
        assert_same(image, uint8_pixels(image_endpoint.decoded(latents))[0])

    def test_jpg_is_the_same_image(self, image_endpoint: Endpoint) -> None:
        latents = image_endpoint.latents()
        image = remote_decode(image_endpoint.url, latents, **image_endpoint.scaling)
        expected = uint8_pixels(image_endpoint.decoded(latents))[0]
        assert image.format == "jpeg"
        # JPEG at quality 95 of noise, which is hardest to compress
        assert np.abs(np.asarray(image).astype(int) - expected).mean() < 5

    def test_pil_with_a_processor_is_floats_from_0_to_1(self, image_endpoint: Endpoint) -> None:
        latents = image_endpoint.latents(batch=2)
        images = remote_decode(
            image_endpoint.url, latents, processor=VaeImageProcessor(), return_type="pt", **image_endpoint.scaling
        )
        expected = (image_endpoint.decoded(latents) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(images, expected, atol=TOLERANCE, rtol=0)

    def test_pt_is_the_decoder_output(self, endpoint: Endpoint) -> None:
        latents = endpoint.latents(batch=2)
        decoded = remote_decode(endpoint.url, latents, output_type="pt", return_type="pt", **endpoint.scaling)
        torch.testing.assert_close(decoded, endpoint.decoded(latents), atol=TOLERANCE, rtol=0)

    def test_exact_runs_diffusers_own_pass(self, image_endpoint: Endpoint) -> None:
        for exact in ("true", "1"):
            response = image_endpoint.post(image_endpoint.latents(), output_type="pt", exact=exact)
            assert (response.status_code, response.headers["X-VAE-Mode"]) == (200, "full")
        response = image_endpoint.post(image_endpoint.latents(), exact="maybe")
        assert response.status_code == 400
        assert "`exact`: Input should be a valid boolean" in response.json()["error"]

    def test_pt_with_partial_postprocess_is_uint8(self, endpoint: Endpoint) -> None:
        latents = endpoint.latents(batch=2 if endpoint.kind == "image" else 1)
        pixels = remote_decode(
            endpoint.url,
            latents,
            output_type="pt",
            return_type="pt",
            partial_postprocess=True,
            **endpoint.scaling,
        )
        assert pixels.dtype == torch.uint8
        assert_same(pixels, uint8_pixels(endpoint.decoded(latents)))

    def test_pil_for_a_video_is_floats(self, video_endpoint: Endpoint) -> None:
        latents = video_endpoint.latents()
        frames = remote_decode(
            video_endpoint.url, latents, processor=VideoProcessor(), return_type="pt", **video_endpoint.scaling
        )
        expected = (video_endpoint.decoded(latents)[0].movedim(1, 0) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(frames, expected, atol=TOLERANCE, rtol=0)

    def test_mp4(self, video_endpoint: Endpoint) -> None:
        latents = video_endpoint.latents(frames=3)
        video = remote_decode(
            video_endpoint.url, latents, output_type="mp4", return_type="mp4", **video_endpoint.scaling
        )
        with av.open(io.BytesIO(video)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 24)
            assert stream.codec_context.colorspace == 1  # BT.709, so that players show the right colors
            luma = np.stack([frame.to_ndarray()[:64] for frame in container.decode(video=0)])
        expected = np.stack(
            [
                av.VideoFrame.from_ndarray(pixels).reformat(format="yuv420p", dst_colorspace="ITU709").to_ndarray()[:64]
                for pixels in uint8_pixels(video_endpoint.decoded(latents))
            ]
        )
        assert len(luma) == 9
        # H.264 keeps luma close (CRF 17) even for noise. It halves the resolution of color, which is not compared.
        assert np.abs(luma.astype(int) - expected).mean() < 3

    def test_mp4_at_another_frame_rate(self, video_endpoint: Endpoint) -> None:
        response = video_endpoint.post(video_endpoint.latents(), output_type="mp4", fps="12.5", do_scaling=True)
        assert response.headers["content-type"] == "video/mp4"
        with av.open(io.BytesIO(response.content)) as container:
            assert container.streams.video[0].average_rate == 12.5

    @pytest.mark.parametrize("image_format", ["webp", "png", "jpg"])
    def test_image_format_by_parameter_or_by_accept(self, image_endpoint: Endpoint, image_format: str) -> None:
        latents, media_type = image_endpoint.latents(), f"image/{image_format.replace('jpg', 'jpeg')}"
        by_parameter = image_endpoint.post(latents, image_format=image_format, **image_endpoint.scaling)
        by_accept = image_endpoint.post(latents, headers={"Accept": media_type}, **image_endpoint.scaling)
        assert by_parameter.headers["content-type"] == by_accept.headers["content-type"] == media_type
        assert by_parameter.content == by_accept.content

    def test_quality(self, image_endpoint: Endpoint) -> None:
        low, high = (image_endpoint.post(image_endpoint.latents(), quality=q, do_scaling=True) for q in (30, 95))
        assert len(low.content) < len(high.content) / 2


class TestScaling:
    def test_do_scaling_uses_the_factors_of_the_checkpoint(self, endpoint: Endpoint) -> None:
        latents = endpoint.latents()
        decoded = as_tensor(endpoint.post(latents, output_type="pt", do_scaling=True))
        torch.testing.assert_close(decoded, endpoint.decoded(latents), atol=TOLERANCE, rtol=0)

    @pytest.mark.parametrize("parameters", [{}, {"do_scaling": False}])
    def test_latents_without_scaling_parameters_are_raw(self, endpoint: Endpoint, parameters: dict) -> None:
        latents = endpoint.latents()
        with torch.no_grad():
            expected = endpoint.vae.decode(latents, return_dict=False)[0]
        decoded = as_tensor(endpoint.post(latents, output_type="pt", **parameters))
        torch.testing.assert_close(decoded, expected, atol=TOLERANCE, rtol=0)

    def test_scaling_factor_wins_over_do_scaling(self, endpoint: Endpoint) -> None:
        latents = endpoint.latents()
        with torch.no_grad():
            expected = endpoint.vae.decode(latents / 0.5, return_dict=False)[0]
        decoded = as_tensor(endpoint.post(latents, output_type="pt", do_scaling=True, scaling_factor=0.5))
        torch.testing.assert_close(decoded, expected, atol=TOLERANCE, rtol=0)


class TestLatentLayouts:
    def test_packed(self, image_endpoint: Endpoint) -> None:
        latents = image_endpoint.latents()
        image = remote_decode(
            image_endpoint.url, pack(latents), image_format="png", height=64, width=96, **image_endpoint.scaling
        )
        assert_same(image, uint8_pixels(image_endpoint.decoded(latents))[0])

    def test_unbatched_with_height_and_width(self, image_endpoint: Endpoint) -> None:
        latents = image_endpoint.latents()
        image = remote_decode(
            image_endpoint.url, latents[0], image_format="png", height=64, width=96, **image_endpoint.scaling
        )
        assert_same(image, uint8_pixels(image_endpoint.decoded(latents))[0])

    def test_height_and_width_are_ignored_for_unpacked_latents(self, endpoint: Endpoint) -> None:
        latents = endpoint.latents()
        response = endpoint.post(latents, output_type="pt", height=2, width=77, **endpoint.scaling)
        torch.testing.assert_close(as_tensor(response), endpoint.decoded(latents), atol=TOLERANCE, rtol=0)

    def test_unbatched_video(self, video_endpoint: Endpoint) -> None:
        latents = video_endpoint.latents()
        response = video_endpoint.post(latents[0], output_type="pt", **video_endpoint.scaling)
        torch.testing.assert_close(as_tensor(response), video_endpoint.decoded(latents), atol=TOLERANCE, rtol=0)

    @pytest.mark.parametrize("size", ["64.5", "None", "-8", ""])
    def test_invalid_height_and_width_are_ignored(self, image_endpoint: Endpoint, size: str) -> None:
        assert image_endpoint.post(image_endpoint.latents(), output_type="pt", height=size, width=size).ok

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_latents(self, endpoint: Endpoint, dtype: torch.dtype) -> None:
        latents = endpoint.latents().to(dtype)
        decoded = remote_decode(endpoint.url, latents, output_type="pt", return_type="pt", **endpoint.scaling)
        torch.testing.assert_close(decoded, endpoint.decoded(latents.float()), atol=TOLERANCE, rtol=0)


class TestEncode:
    def test_image(self, endpoint: Endpoint, photograph: Image.Image) -> None:
        latents = remote_encode(endpoint.url, photograph, **endpoint.scaling)
        torch.testing.assert_close(latents, endpoint.encoded(preprocess(photograph, endpoint)), atol=TOLERANCE, rtol=0)

    def test_without_scaling(self, image_endpoint: Endpoint, photograph: Image.Image) -> None:
        latents = remote_encode(image_endpoint.url, photograph)
        with torch.no_grad():
            expected = image_endpoint.vae.encode(preprocess(photograph, image_endpoint)).latent_dist.mode()
        torch.testing.assert_close(latents, expected, atol=TOLERANCE, rtol=0)

    def test_tensor(self, endpoint: Endpoint, photograph: Image.Image) -> None:
        pixels = preprocess(photograph, endpoint)
        latents = remote_encode(endpoint.url, pixels, **endpoint.scaling)
        torch.testing.assert_close(latents, endpoint.encoded(pixels), atol=TOLERANCE, rtol=0)

    def test_uint8_tensor_with_channels_first(self, image_endpoint: Endpoint, photograph: Image.Image) -> None:
        channels_first = torch.from_numpy(np.asarray(photograph).copy()).permute(2, 0, 1).contiguous()
        expected = image_endpoint.encoded(preprocess(photograph, image_endpoint))
        for tensor in (channels_first, channels_first[None]):
            latents = as_tensor(image_endpoint.post(tensor, **image_endpoint.scaling))
            torch.testing.assert_close(latents, expected, atol=TOLERANCE, rtol=0)

    def test_uint8_tensor_in_the_layout_of_decoding(self, endpoint: Endpoint, photograph: Image.Image) -> None:
        channels_last = torch.from_numpy(np.asarray(photograph)[None].copy())
        latents = as_tensor(endpoint.post(channels_last, **endpoint.scaling))
        expected = endpoint.encoded(preprocess(photograph, endpoint))
        torch.testing.assert_close(latents, expected, atol=TOLERANCE, rtol=0)

    @pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
    def test_file_formats(self, image_endpoint: Endpoint, photograph: Image.Image, image_format: str) -> None:
        buffer = io.BytesIO()
        photograph.save(buffer, format=image_format)
        response = requests.post(image_endpoint.url, data=buffer.getvalue(), params=image_endpoint.scaling, timeout=60)
        expected = image_endpoint.encoded(preprocess(Image.open(buffer), image_endpoint))
        torch.testing.assert_close(as_tensor(response), expected, atol=TOLERANCE, rtol=0)

    def test_an_image_is_resized_down_to_a_multiple(self, image_endpoint: Endpoint, photograph: Image.Image) -> None:
        image = photograph.resize((77, 61))
        latents = remote_encode(image_endpoint.url, image, **image_endpoint.scaling)
        assert latents.shape[2:] == (7, 9)
        torch.testing.assert_close(
            latents, image_endpoint.encoded(preprocess(image, image_endpoint)), atol=TOLERANCE, rtol=0
        )

    def test_video(self, video_endpoint: Endpoint) -> None:
        video = video_endpoint.post(video_endpoint.latents(frames=2), output_type="mp4").content
        with av.open(io.BytesIO(video)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        response = requests.post(video_endpoint.url, data=video, params=video_endpoint.scaling, timeout=60)
        expected = video_endpoint.encoded(VideoProcessor(vae_scale_factor=8).preprocess_video(frames))
        assert expected.shape[2] == 2
        torch.testing.assert_close(as_tensor(response), expected, atol=TOLERANCE, rtol=0)

    def test_the_seed_determines_the_sample(self, endpoint: Endpoint, photograph: Image.Image) -> None:
        pixels = preprocess(photograph, endpoint)
        latents = as_tensor(endpoint.post(pixels, sample_mode="sample", seed=7))
        with torch.no_grad():
            expected = endpoint.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(7))
        torch.testing.assert_close(latents, expected, atol=TOLERANCE, rtol=0)
        unseeded = [as_tensor(endpoint.post(pixels, sample_mode="sample")) for _ in range(2)]
        assert not torch.equal(*unseeded)


class TestPaths:
    def test_explicit_and_implicit_paths_agree(self, endpoint: Endpoint, photograph: Image.Image) -> None:
        latents, pixels = endpoint.latents(), preprocess(photograph, endpoint)
        decoded = [endpoint.post(latents, path, output_type="pt") for path in ("/", "/predict", "/decode")]
        encoded = [endpoint.post(pixels, path) for path in ("/", "/predict", "/encode")]
        assert len({response.content for response in decoded}) == 1
        assert len({response.content for response in encoded}) == 1

    def test_health_and_metrics(self, endpoint: Endpoint) -> None:
        assert (
            requests.get(endpoint.url, timeout=5).text == requests.get(f"{endpoint.url}/health", timeout=5).text == "Ok"
        )
        metrics = requests.get(f"{endpoint.url}/metrics", timeout=5).text
        assert {"inf_batch_current_size 0.0", "inf_queue_size 0.0"} <= set(metrics.splitlines())

    def test_server_timing(self, endpoint: Endpoint) -> None:
        headers = endpoint.post(endpoint.latents(), output_type="pt").headers
        stages = ", ".join(rf"{stage};dur=\d+\.\d" for stage in ("payload", "queue", "vae", "output"))
        assert re.fullmatch(stages, headers["Server-Timing"])
        assert headers["X-VAE-Mode"] in ("full", "fast")


class TestOlderClients:
    """Tests of base64 and JSON, which clients before the binary protocol send."""

    def test_tensor_base64_as_input_and_output(self, endpoint: Endpoint) -> None:
        latents = endpoint.latents()
        response = requests.post(
            endpoint.url,
            json={"inputs": base64.b64encode(tensor_bytes(latents)).decode()},
            params={"shape": list(latents.shape), "dtype": "float32", "output_type": "pt", "do_scaling": True},
            headers={"Content-Type": "tensor/base64", "Accept": "tensor/base64"},
            timeout=60,
        )
        message = response.json()
        assert message["parameters"]["dtype"] == "float32"
        decoded = torch.frombuffer(bytearray(base64.b64decode(message["inputs"])), dtype=torch.float32)
        expected = endpoint.decoded(latents)
        torch.testing.assert_close(decoded.reshape(message["parameters"]["shape"]), expected, atol=TOLERANCE, rtol=0)

    @pytest.mark.parametrize("accept", ["image/png", "image/jpeg", "application/json", "*/*"])
    def test_json_image(self, image_endpoint: Endpoint, accept: str) -> None:
        latents = image_endpoint.latents()
        parameters = {"shape": list(latents.shape), "dtype": "float32", "image_format": None, **image_endpoint.scaling}
        message = {"inputs": base64.b64encode(tensor_bytes(latents)).decode(), "parameters": parameters}
        response = requests.post(image_endpoint.url, json=message, headers={"Accept": accept}, timeout=60)
        in_json = accept in ("application/json", "*/*")
        body = base64.b64decode(response.json()) if in_json else response.content
        expected = uint8_pixels(image_endpoint.decoded(latents))[0]
        if accept == "image/jpeg":
            assert np.abs(as_array(body).astype(int) - expected).mean() < 5
        else:
            assert_same(as_array(body), expected)

    def test_json_tensor(self, endpoint: Endpoint) -> None:
        latents = endpoint.latents()
        parameters = {"shape": list(latents.shape), "dtype": "float32", "output_type": "pt", **endpoint.scaling}
        message = {"inputs": base64.b64encode(tensor_bytes(latents)).decode(), "parameters": parameters}
        response = requests.post(endpoint.url, json=message, headers={"Accept": "application/json"}, timeout=60).json()
        decoded = torch.frombuffer(bytearray(base64.b64decode(response["inputs"])), dtype=torch.float32)
        expected = endpoint.decoded(latents)
        torch.testing.assert_close(decoded.reshape(response["parameters"]["shape"]), expected, atol=TOLERANCE, rtol=0)

    def test_json_parameters_win_over_the_query(self, image_endpoint: Endpoint) -> None:
        latents = image_endpoint.latents()
        parameters = {"shape": list(latents.shape), "dtype": "float32", "image_format": "png"}
        message = {"inputs": base64.b64encode(tensor_bytes(latents)).decode(), "parameters": parameters}
        response = requests.post(
            image_endpoint.url,
            json=message,
            params={"image_format": "webp"},
            headers={"Accept": "image/webp"},
            timeout=60,
        )
        assert response.headers["content-type"] == "image/png"

    def test_json_encode(self, image_endpoint: Endpoint, photograph: Image.Image) -> None:
        buffer = io.BytesIO()
        photograph.save(buffer, format="PNG")
        message = {"inputs": base64.b64encode(buffer.getvalue()).decode(), "parameters": image_endpoint.scaling}
        response = requests.post(image_endpoint.url, json=message, timeout=60).json()
        latents = torch.frombuffer(bytearray(base64.b64decode(response["inputs"])), dtype=torch.float32)
        expected = image_endpoint.encoded(preprocess(photograph, image_endpoint))
        torch.testing.assert_close(latents.reshape(response["parameters"]["shape"]), expected, atol=TOLERANCE, rtol=0)


WRONG_TENSORS = {
    "missing shape": ({"shape": None}, "`shape` is missing"),
    "missing dtype": ({"dtype": None}, "`dtype` is missing: one of float16"),
    "unknown dtype": ({"dtype": "float64"}, r"`dtype`: .*'float16'.*got 'float64'"),
    "shape of other bytes": (
        {"shape": [1, 4, 8, 8]},
        r"`shape` \[1, 4, 8, 8\] of float32 is 1024 bytes, but the body",
    ),
    "shape that is no number": ({"shape": ["1", "x"]}, r"`shape\[1\]`: .*got 'x'"),
    "negative shape": ({"shape": [1, -4]}, r"`shape\[1\]`: .*greater than 0, got '-4'"),
    "unknown output type": ({"output_type": "gif"}, r"`output_type`: .*'pil'.*got 'gif'"),
    "unknown image format": ({"image_format": "bmp"}, r"`image_format`: .*got 'bmp'"),
    "quality out of range": ({"quality": 101}, r"`quality`: .*100.*got '101'"),
    "scaling by zero": ({"scaling_factor": 0}, r"`scaling_factor`: .*zero.*got '0'"),
    "scaling by nan": ({"scaling_factor": "nan"}, r"`scaling_factor`: .*finite.*got 'nan'"),
    "fps that is none": ({"fps": 0.0001}, r"`fps`: .*greater than or equal to 1, got '0.0001'"),
    "no bool": ({"do_scaling": "perhaps"}, r"`do_scaling`: .*got 'perhaps'"),
}


class TestCommonFirstAttempts:
    @pytest.mark.parametrize("shape", ["1,4,8,12", "[1, 4, 8, 12]", "(1,4,8,12)"])
    def test_a_shape_in_a_single_parameter(self, running: Any, shape: str) -> None:
        endpoint = running("sd-v1")
        latents = endpoint.latents()
        expected = endpoint.post(latents, output_type="pt")
        response = requests.post(
            endpoint.url,
            data=latents.numpy().tobytes(),
            params={"shape": shape, "dtype": "float32", "output_type": "pt"},
            timeout=30,
        )
        assert response.content == expected.content

    @pytest.mark.parametrize("path", ["/predict/", "/decode/", "/predict", "/"])
    @pytest.mark.parametrize("method", ["POST", "PUT"])
    def test_a_slash_and_another_method(self, running: Any, method: str, path: str) -> None:
        endpoint = running("sd-v1")
        latents = endpoint.latents()
        parameters = {"shape": list(latents.shape), "dtype": "float32", "output_type": "pt"}
        expected = requests.post(endpoint.url, data=latents.numpy().tobytes(), params=parameters, timeout=30)
        sent = {"data": latents.numpy().tobytes(), "params": parameters, "timeout": 30}
        response = requests.request(method, endpoint.url + path, **sent)
        assert response.content == expected.content
        assert expected.ok

    @pytest.mark.parametrize("options", ["-F file=@photo.png", "-T photo.png", "--data-binary @photo.png"])
    def test_a_file_by_curl(self, running: Any, photograph: Image.Image, tmp_path: Path, options: str) -> None:
        endpoint = running("sd-v1")
        photograph.save(tmp_path / "photo.png")
        command = ["curl", "-sf", *options.split(), f"{endpoint.url}/encode"]
        response = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
        expected = requests.post(f"{endpoint.url}/encode", data=(tmp_path / "photo.png").read_bytes(), timeout=30)
        assert response == expected.content

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("-d @photo.jpg {url}/encode", "curl's -d drops line breaks: use --data-binary"),
            ("-d @latents.bin {url}/decode?shape=1,4,64,64&dtype=float32", "; curl's -d drops line breaks"),
            ("--data-binary photo.jpg {url}/encode", "the text 'photo.jpg' (curl sends the content of a file with"),
            ("-X POST {url}/encode", "it is empty"),
            ("{url}/encode", "it takes POST, PUT; curl sends a file with `--data-binary @FILE`"),
            ("--data-binary @latents.bin {url}/decode", "e.g. ?shape=1,4,64,64&dtype=float16"),
        ],
    )
    def test_a_mistake_with_curl_has_an_error_text(
        self, running: Any, photograph: Image.Image, tmp_path: Path, options: str, message: str
    ) -> None:
        photograph.resize((512, 512)).save(tmp_path / "photo.jpg")
        latents = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
        (tmp_path / "latents.bin").write_bytes(latents.numpy().tobytes())
        command = ["curl", "-s", "--fail-with-body", *options.format(url=running("sd-v1").url).split()]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
        assert result.returncode == 22
        assert message in json.loads(result.stdout)["error"]

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_output_dtype(self, endpoint: Endpoint, dtype: str) -> None:
        latents = endpoint.latents()
        for path, tensor in (("/decode", latents), ("/encode", torch.zeros(1, 3, *(1,) * (latents.ndim - 4), 64, 64))):
            own = as_tensor(endpoint.post(tensor, path, output_type="pt"))
            converted = as_tensor(endpoint.post(tensor, path, output_type="pt", output_dtype=dtype))
            assert torch.equal(converted, own.to(getattr(torch, dtype)))
        uint8 = endpoint.post(latents, output_type="pt", partial_postprocess=True, output_dtype=dtype)
        assert uint8.headers["dtype"] == "uint8"

    def test_values_out_of_range_of_the_output_dtype(self, running: Any) -> None:
        response = running("sd-v1").post(torch.rand(1, 3, 64, 64), scaling_factor=1e6, output_dtype="float16")
        assert (response.status_code, "`output_dtype`" in response.json()["error"]) == (422, True)

    def test_a_batch_of_sdnext(self, running: Any) -> None:
        """Send the request of SD.Next: a batch of 2, packed."""
        response = running("flux").post(torch.zeros(2, 16, 64), height=64, width=64)
        assert response.status_code == 400
        assert "in a UI: a batch size of 1, and a larger batch count" in response.json()["error"]


class TestWrongInput:
    """Tests of errors: each is a 4xx with the actual and the expected value, and the next request succeeds."""

    @pytest.mark.parametrize("name", WRONG_TENSORS)
    def test_tensor(self, image_endpoint: Endpoint, name: str) -> None:
        parameters, message = WRONG_TENSORS[name]
        response = image_endpoint.post(image_endpoint.latents(), **parameters)
        self.assert_refused(image_endpoint, response, message)

    def test_wrong_channel_count(self, endpoint: Endpoint) -> None:
        channels = endpoint.vae.config.latent_channels
        latents = torch.cat([endpoint.latents(), endpoint.latents()], dim=1)
        message = rf"`shape` \[1, {channels * 2}, .*expected \[B, {channels}, .*height/8, width/8\]"
        self.assert_refused(endpoint, endpoint.post(latents), message, status=422)

    def test_packed_without_height_and_width(self, image_endpoint: Endpoint) -> None:
        response = image_endpoint.post(pack(image_endpoint.latents()))
        self.assert_refused(
            image_endpoint, response, r"packed .*with `height` and `width` \(got height=None, width=None\)", status=422
        )

    def test_packed_with_an_impossible_size(self, image_endpoint: Endpoint) -> None:
        response = image_endpoint.post(pack(image_endpoint.latents()), height=-64, width=-96)
        self.assert_refused(image_endpoint, response, r"got height=-64, width=-96", status=422)

    def test_three_packed_latents_are_not_read_as_pixels(self, image_endpoint: Endpoint) -> None:
        packed = pack(image_endpoint.latents(batch=3))
        message = "may be pixels, or packed latents without their `height` and `width`"
        self.assert_refused(image_endpoint, image_endpoint.post(packed), message)
        decoded = image_endpoint.post(packed, height=64, width=96, output_type="pt", **image_endpoint.scaling)
        expected = image_endpoint.decoded(image_endpoint.latents(batch=3))
        torch.testing.assert_close(as_tensor(decoded), expected, atol=TOLERANCE, rtol=0)

    def test_an_image_too_large_for_its_format(self, image_endpoint: Endpoint) -> None:
        channels = image_endpoint.vae.config.latent_channels
        response = image_endpoint.post(torch.zeros(1, channels, 1, 2048), image_format="webp")
        self.assert_refused(
            image_endpoint, response, "16384x8 pixels are too large for a webp file \\(16383 per side\\)", status=422
        )

    def test_mp4_from_an_image_model(self, image_endpoint: Endpoint) -> None:
        response = image_endpoint.post(image_endpoint.latents(), output_type="mp4")
        self.assert_refused(image_endpoint, response, r"`output_type`: 'mp4' needs a video model", status=422)

    def test_batch_as_one_image(self, image_endpoint: Endpoint) -> None:
        response = image_endpoint.post(image_endpoint.latents(batch=2))
        self.assert_refused(
            image_endpoint, response, r"a batch of 2 does not fit in one encoded image; .*output_type=pt"
        )

    @pytest.mark.parametrize("output_type", ["mp4", "pil"])
    def test_batch_as_one_video(self, video_endpoint: Endpoint, output_type: str) -> None:
        response = video_endpoint.post(
            video_endpoint.latents(batch=2), headers={"Accept": "tensor/binary"}, output_type=output_type
        )
        self.assert_refused(video_endpoint, response, r"a batch of 2 does not fit in .*output_type=pt")

    def test_video_as_an_image(self, video_endpoint: Endpoint) -> None:
        response = video_endpoint.post(video_endpoint.latents(), headers={"Accept": "image/png"}, output_type="pil")
        self.assert_refused(video_endpoint, response, "a video cannot be sent as images")

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b"", "`shape` is missing, and the body is no PNG"),
            (b"\x89PNG\r\n\x1a\nrubbish", "the image cannot be read"),
            (b"\xff\xd8\xff rubbish", "the image cannot be read"),
            (b"GIF89a rubbish", "the body is no PNG, JPEG, WebP or MP4 file"),
        ],
    )
    def test_unreadable_image(self, image_endpoint: Endpoint, body: bytes, message: str) -> None:
        self.assert_refused(image_endpoint, requests.post(image_endpoint.url, data=body, timeout=60), message)

    def test_unreadable_video(self, video_endpoint: Endpoint) -> None:
        response = requests.post(video_endpoint.url, data=b"\x00\x00\x00 ftypisom rubbish", timeout=60)
        self.assert_refused(video_endpoint, response, "the video cannot be read")

    def test_video_for_an_image_model(self, image_endpoint: Endpoint) -> None:
        response = requests.post(image_endpoint.url, data=b"\x00\x00\x00 ftypisom", timeout=60)
        self.assert_refused(image_endpoint, response, "the body is a video, but this is an image model", status=422)

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("{", "the body is not JSON"),
            ("[]", "must be a JSON object with base64 text under `inputs`"),
            ('{"inputs": 3}', "`inputs` must be base64 text, got int"),
            ('{"inputs": "***"}', "`inputs` is not base64"),
            ('{"inputs": "", "parameters": 3}', "`parameters` must be a JSON object, got int"),
            ('{"inputs": "AAAA", "parameters": {"shape": null}}', "the body is no PNG"),
            ("[" * 100_000, "the body is not JSON"),
        ],
    )
    def test_json(self, image_endpoint: Endpoint, body: str, message: str) -> None:
        headers = {"Content-Type": "application/json"}
        response = requests.post(image_endpoint.url, data=body, headers=headers, timeout=60)
        self.assert_refused(image_endpoint, response, message)

    def test_image_to_decode_and_latents_to_encode(self, endpoint: Endpoint, photograph: Image.Image) -> None:
        buffer = io.BytesIO()
        photograph.save(buffer, format="PNG")
        response = requests.post(f"{endpoint.url}/decode", data=buffer.getvalue(), timeout=60)
        self.assert_refused(endpoint, response, "decoding takes latents; POST it to /encode")
        response = endpoint.post(endpoint.latents(), "/encode")
        self.assert_refused(endpoint, response, r"is no shape of pixels: expected \[B, 3, .*height, width\]", 422)

    def test_pixels_with_a_size_that_is_not_a_multiple(self, image_endpoint: Endpoint) -> None:
        response = image_endpoint.post(torch.zeros(1, 3, 60, 64))
        self.assert_refused(image_endpoint, response, "height and width must be multiples of 8", status=422)

    def test_too_small_image(self, image_endpoint: Endpoint, photograph: Image.Image) -> None:
        with pytest.raises(RuntimeError, match="7x20 pixels; this VAE needs at least 8x8"):
            remote_encode(image_endpoint.url, photograph.resize((7, 20)))

    def test_unknown_path_and_method(self, endpoint: Endpoint) -> None:
        response = requests.post(f"{endpoint.url}/nowhere", timeout=5)
        assert (response.status_code, response.json()["error"][:20]) == (404, "there is no /nowhere")
        response = requests.delete(endpoint.url, timeout=5)
        assert (response.status_code, response.json()["error"][:33]) == (405, "/ does not take DELETE, it takes ")
        assert {method.strip() for method in response.headers["Allow"].split(",")} == {"GET", "HEAD", "POST", "PUT"}

    def test_the_client_raises_with_the_message(self, image_endpoint: Endpoint) -> None:
        with pytest.raises(RuntimeError, match="batch of 2"):
            remote_decode(image_endpoint.url, image_endpoint.latents(batch=2), **image_endpoint.scaling)

    def assert_refused(self, endpoint: Endpoint, response: requests.Response, message: str, status: int = 400) -> None:
        assert response.status_code == status
        assert response.headers["content-type"] == "application/json"
        assert re.search(message, response.json()["error"]), response.json()["error"]
        assert endpoint.post(endpoint.latents(), output_type="pt").ok


def preprocess(image: Image.Image, endpoint: Endpoint) -> torch.Tensor:
    """Return the input that diffusers' own processor gives the VAE: one frame for a video model.

    The tensor is contiguous, because `remote_encode` sends freed memory for other tensors.
    """
    pixels = VaeImageProcessor(vae_scale_factor=8).preprocess(image).contiguous()
    return pixels.unsqueeze(2) if endpoint.kind == "video" else pixels


class TestWithoutAModel:
    """Tests of the app in this process: before its model is loaded, and with a bug."""

    async def send_request(
        self, app: Starlette, path: str, method: str = "GET"
    ) -> tuple[int, dict[bytes, bytes], dict]:
        """Send a request without a server. Return status, headers and JSON."""
        scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b"", "app": app}
        sent: list[dict] = []

        async def receive() -> dict:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict) -> None:
            sent.append(message)

        with suppress(ZeroDivisionError):  # starlette responds to a crash, then raises it for the server's log
            await app(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], dict(sent[0]["headers"]), json.loads(body)

    def test_loading_is_503_with_retry_after(self) -> None:
        for method, path in (("GET", "/health"), ("POST", "/")):
            status, headers, response = asyncio.run(self.send_request(build_app(), path, method))
            assert (status, response, headers[b"retry-after"]) == (503, {"error": "the model is loading"}, b"5")

    def test_a_crash_is_json_without_its_details(self) -> None:
        class Broken:
            @property
            def pipeline(self) -> None:
                raise ZeroDivisionError("secret")

        app = build_app()
        app.state.handler = Broken()
        status, headers, response = asyncio.run(self.send_request(app, "/health"))
        assert (status, response["error"]) == (500, "the service failed on this request; its log has the reason")
        assert response["request_id"] == headers[b"x-request-id"].decode()
