"""Tests that need a GPU: `benchmarks/gpu.sh` runs them on CUDA.

VAE_TEST_DEVICE names another device. With "cpu" all tests run except those of a GPU's memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import requests
import torch
from torch import Tensor

from benchmarks.forward import check
from handlers import MODELS
from handlers.serving.settings import Settings
from handlers.serving.vae import vae as vae_module
from handlers.serving.vae.fast.check import FastPasses
from handlers.serving.vae.heap import map_gpu_memory
from handlers.serving.vae.memory import Mode
from handlers.serving.vae.vae import VAE
from tests.serving.test_fast import inputs, outputs
from tests.support.checkpoints import build, model_for
from tests.support.small_service import SERVED, Service, running_service

DEVICE = os.environ.get("VAE_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE.startswith("cuda") and not torch.cuda.is_available(),
    reason="there is no GPU; VAE_TEST_DEVICE=cpu runs these tests on the CPU",
)
map_gpu_memory()
MODEL_FRAMES = [("sd-v1", None), ("flux2", None), ("wan-2.1", 3), ("qwen-image", 1), ("hunyuan-video", 3)]


def loaded(key: str) -> tuple[VAE, Any]:
    """Load a small model on the device, in its own dtype and checked, and the same model in plain diffusers."""
    model = build(key).to(DEVICE, torch.float32 if DEVICE == "cpu" else getattr(torch, MODELS[key].dtype))
    vae = VAE(deepcopy(model), MODELS[key], fast=True)
    check(vae)
    return vae, model


def run(vae: VAE, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[Mode]]:
    decoded, mode = vae.decode(tensors["decode"])
    moments, other = vae.encode(tensors["encode"])
    return {"decode": decoded, "encode": moments}, {mode, other}


@pytest.mark.parametrize(("key", "frames"), MODEL_FRAMES)
def test_every_mode(key: str, frames: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, model = loaded(key)
    print(key, vae.fast.verdicts)
    tensors = {task: tensor.to(DEVICE) for task, tensor in inputs(key, frames, model.dtype).items()}
    own = outputs(model, tensors)["decode"]
    wide = torch.float64 if model.dtype == torch.float32 else torch.float32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = outputs(deepcopy(model).to(wide), {task: tensor.to(wide) for task, tensor in tensors.items()})["decode"]
    bound = 1.2 * (own - exact).square().mean().sqrt()
    # The fast pass runs here whether or not it is faster.
    monkeypatch.setattr(FastPasses, "used", lambda passes, task, pixels=0: passes.candidates[task][0])
    for mode in (Mode.FAST, Mode.FULL, Mode.REDUCED, Mode.SLICED, Mode.TILED):
        monkeypatch.setattr(VAE, "_offered", lambda *_, mode=mode: [mode])
        results, modes = run(vae, tensors)
        assert modes == {mode}
        if mode is Mode.FULL:
            assert torch.equal(results["decode"].view_as(own), own)
        elif mode is not Mode.TILED:
            assert (results["decode"].view_as(exact) - exact).square().mean().sqrt() <= bound, mode


@pytest.mark.skipif(not DEVICE.startswith("cuda"), reason="a CPU does not fail: it kills")
def test_out_of_memory_runs_in_a_lower_mode_and_the_next_request_works(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = VAE.load(MODELS["sd-v1"], "", Settings(weights="random"), DEVICE)
    latents = torch.randn(1, 4, 256, 256)
    vae.decode(latents)  # the first pass makes what later ones keep
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - 6 * 10**9, dtype=torch.uint8, device=DEVICE)
    monkeypatch.setattr(vae_module, "free_memory", lambda device: 10**12)  # the plan estimates that everything fits
    _, mode = vae.decode(latents)
    assert mode is not Mode.FULL
    del ballast
    torch.cuda.empty_cache()
    assert vae.decode(latents)[1] is Mode.FULL
    assert vae.is_alive()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with running_service(folder / "checkpoints", folder / "log", VAE_DEVICE=DEVICE) as running:
        yield running


@pytest.mark.parametrize("key", SERVED)
def test_every_model_over_http(service: Service, key: str) -> None:
    about = requests.get(f"{service.url}/{key}/config", timeout=5).json()
    assert about["device"].startswith(DEVICE)
    model = model_for(key)
    frames = [model.least_latent_frames] if model.kind == "video" else []
    scaling = {"do_scaling": "true"} if model.takes_scaled else {}
    latents = torch.randn(1, model.latent_channels, *frames, 4, 6)
    pixels = service.tensor(key, latents, "decode", output_type="pt", **scaling)
    assert pixels.isfinite().all()
    pixels = pixels[:, :, :1] if frames else pixels  # every encoder takes one frame
    assert service.tensor(key, pixels.float().clamp(-1, 1), "encode", **scaling).isfinite().all()
