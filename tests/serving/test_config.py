"""Tests that `GET /config`, `/metrics` and a request ask a GPU for nothing that makes them wait or fail."""

import pytest
import torch
from prometheus_client import REGISTRY

from handlers import MODELS
from handlers.serving import pipeline as pipeline_module
from handlers.serving.http.config import describe
from handlers.serving.pipeline import Pipeline
from handlers.serving.settings import Settings
from handlers.serving.vae.vae import VAE
from tests.support.checkpoints import build


@pytest.mark.parametrize("key", ["flux2", "ltx-video"])  # their checkpoints have statistics
def test_the_config_reads_no_tensor_of_the_model(key: str) -> None:
    pipeline = Pipeline([VAE(build(key), MODELS[key])], Settings())
    described = describe(pipeline)
    assert described["buffers"]
    pipeline.vae.model.to("meta")  # a tensor without values, as one whose values a GPU computes still
    assert describe(pipeline) == described


@pytest.mark.parametrize("key", ["sd-v1", pytest.param("wan-2.1", marks=pytest.mark.slow)])
def test_a_request_does_not_search_the_model_for_its_device_and_dtype(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = VAE(build(key), MODELS[key])

    def search(model: object) -> None:
        raise AssertionError("this walks all modules")

    monkeypatch.setattr(type(vae.model), "device", property(search))
    monkeypatch.setattr(type(vae.model), "dtype", property(search))
    frames = (1,) if key == "wan-2.1" else ()
    pixels, _ = vae.decode(torch.zeros(1, MODELS[key].latent_channels, *frames, 2, 2))
    vae.encode(pixels)


def test_the_metrics_of_a_lost_gpu_are_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    pipeline = Pipeline([VAE(build("sd-v1"), MODELS["sd-v1"])], Settings())
    pipeline.measure()
    before = REGISTRY.get_sample_value("vae_device_free_bytes", {"device": "cpu"})
    monkeypatch.setattr(pipeline_module, "free_memory", fail)
    pipeline.measure()
    assert REGISTRY.get_sample_value("vae_device_free_bytes", {"device": "cpu"}) == before
