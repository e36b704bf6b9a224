"""Tests of several VAEs in one service: each under its name, the first at the root, with one thread for all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image

from handlers import MODELS, get_handler
from handlers.serving.devices import DevicePool
from handlers.serving.pipeline import Pipeline
from handlers.serving.settings import Settings
from handlers.serving.vae.vae import VAE
from handlers.version import VERSION
from scripts.local_server import ROOT, serve
from tests.support.checkpoints import build
from tests.support.endpoint import Endpoint, uint8_pixels
from tests.support.messages import send
from tests.support.values import assert_same
from tests.test_handler import STABLE_TOOLKIT

KEYS = ("sd-v1", "flux", "hunyuan-video")


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Iterator[dict]:
    """Return the endpoints by model, as the toolkit serves a deployed repository. The key "" is the root."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copy(ROOT / "handler.py", folder)
    shutil.copytree(ROOT / "handlers", folder / "handlers", ignore=shutil.ignore_patterns("__pycache__"))
    for key in KEYS:
        shutil.copytree(checkpoint(key), folder / "vae" / key)
    models = [{"model": key, "checkpoint": MODELS[key].checkpoint} for key in KEYS]
    models[1]["revision"] = "abc"
    (folder / "endpoint.json").write_text(json.dumps({"models": models, "version": "1"}))
    log = tmp_path_factory.mktemp("log") / "log"
    with serve(log=log, command=STABLE_TOOLKIT, HF_MODEL_DIR=str(folder), PYTHONSAFEPATH="1") as url:
        endpoints_by_key = {}
        for key in KEYS:
            vae_class = AutoencoderKLHunyuanVideo if key == "hunyuan-video" else AutoencoderKL
            vae = vae_class.from_pretrained(folder / "vae" / key).eval()
            endpoints_by_key[key] = Endpoint(key, f"{url}/{key}", vae, log)
        yield {**endpoints_by_key, "": Endpoint("sd-v1", url, endpoints_by_key["sd-v1"].vae, log)}


@pytest.mark.parametrize("name", ["", "sd-v1", "flux"])
def test_the_client_of_diffusers_works_with_each_model(
    name: str, endpoints: dict[str, Endpoint], photograph: Image.Image
) -> None:
    endpoint = endpoints[name]
    latents = endpoint.latents()
    image = remote_decode(endpoint.url, latents, image_format="png", **endpoint.scaling)
    assert_same(image, uint8_pixels(endpoint.decoded(latents))[0])
    assert remote_encode(endpoint.url, photograph, **endpoint.scaling).shape[1] == latents.shape[1]


def test_a_video_model_beside_image_models(endpoints: dict[str, Endpoint]) -> None:
    endpoint = endpoints["hunyuan-video"]
    latents = endpoint.latents()
    for path in ("", "/", "/predict", "/decode/"):
        response = endpoint.post(latents, path, output_type="pt", **endpoint.scaling)
        decoded = torch.frombuffer(bytearray(response.content), dtype=torch.float32)
        torch.testing.assert_close(decoded, endpoint.decoded(latents).flatten(), atol=1e-5, rtol=0)


def test_config_and_metrics_distinguish_the_models(endpoints: dict[str, Endpoint]) -> None:
    root = requests.get(f"{endpoints[''].url}/config", timeout=5).json()
    assert [model["name"] for model in root["models"]] == list(KEYS)
    assert [model["kind"] for model in root["models"]] == ["image", "image", "video"]
    for key in KEYS:
        about = requests.get(f"{endpoints[key].url}/config", timeout=5).json()
        assert (about["model"], about["checkpoint"]) == (key, MODELS[key].checkpoint)
        assert about["version"] == VERSION
        assert about["revision"] == {"flux": "abc"}.get(key)
        assert "models" not in about
        assert requests.get(endpoints[key].url, timeout=5).text == "Ok"
        assert endpoints[key].post(endpoints[key].latents(), "/decode", exact=True).ok
    text = requests.get(f"{endpoints[''].url}/metrics", timeout=5).text
    for key in KEYS:
        assert f'vae_requests_total{{model="{key}",route="/decode",status="200"}}' in text
        assert f'vae_passes_total{{mode="full",model="{key}",task="decode"}}' in text


def test_an_unknown_model_is_404_and_lists_the_models(endpoints: dict[str, Endpoint]) -> None:
    url = endpoints[""].url
    for path in ("/sdxl/decode", "/flux/decode/flux", "/flux/flux"):
        response = requests.post(url + path, b"", timeout=5)
        assert response.status_code == 404
        assert response.json()["error"].startswith(f"there is no {path}; POST to /, ")
        assert response.json()["error"].endswith("/sd-v1/decode, /flux/decode, /hunyuan-video/decode")


@pytest.mark.slow
def test_out_of_memory_in_one_model_does_not_affect_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings()
    devices = DevicePool([torch.device("cpu")], settings.timeout)
    broken, whole = (Pipeline([VAE(build(key), MODELS[key])], settings, devices=devices) for key in ("sd-v1", "flux"))

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    latents = torch.randn(1, 16, 4, 4)
    (expected,) = whole.vae.model.decode(latents, return_dict=False)
    monkeypatch.setattr(broken.vae.model, "decode", fail)
    for _ in range(2):
        with pytest.raises(Exception, match="which this device does not have free now"):
            send(broken, torch.randn(1, 4, 4, 4))
        result = send(whole, latents, output_type="pt")
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [("sd-v1,sd-v1", "sd-v1 is named twice"), ("sd-v1,fluks", "there is no model 'fluks'"), (",", "no model was")],
)
def test_models_that_cannot_be_served_together(keys: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_handler(keys)


def test_a_single_model_keeps_its_class() -> None:
    assert get_handler("flux") is MODELS["flux"]
