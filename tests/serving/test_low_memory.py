"""Tests that the low-memory pass gives plain diffusers' results for every model class, in less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from benchmarks.memory import Case, measured
from benchmarks.peak import peak_bytes
from handlers import MODELS
from handlers.model import Task
from handlers.serving.vae import low_memory
from handlers.serving.vae.low_memory import reduce_peak
from handlers.serving.vae.memory import Mode
from tests.support.endpoint import SMALL

pytestmark = pytest.mark.slow

Load = Callable[[str], tuple[Any, Any]]


@pytest.fixture
def load(checkpoint: Callable[[str], Path]) -> Load:
    """Return a function that loads plain diffusers, and the same weights with the low-memory pass."""

    def load(key: str) -> tuple[Any, Any]:
        plain = getattr(diffusers, MODELS[key].vae_class).from_pretrained(checkpoint(key)).eval()
        low = copy.deepcopy(plain)
        assert reduce_peak(low)
        return plain, low

    return load


@pytest.fixture(params=[1, 3, 1000], ids=lambda rows: f"chunks of {rows}")
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the rows of a chunk: so few that small images take several chunks, and all at once."""
    monkeypatch.setattr(low_memory, "GROUP_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(low_memory, "MIN_ROWS", request.param)


def inputs(key: str, frames: int | None, batch: int = 2, height: int = 24, width: int = 40) -> tuple[Tensor, Tensor]:
    """Return latents, and pixels in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    latent_frames, pixel_frames = ((), ()) if frames is None else (((frames - 1) // 4 + 1,), (frames,))
    channels = MODELS[key].latent_channels
    latents = torch.randn(batch, channels, *latent_frames, height // 8, width // 8, generator=generator)
    return latents, torch.rand(batch, 3, *pixel_frames, height, width, generator=generator) * 2 - 1


@torch.inference_mode()
def outputs(model: Any, latents: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    latents, pixels = latents.to(model.dtype), pixels.to(model.dtype)
    return model.decode(latents, return_dict=False)[0], model.encode(pixels, return_dict=False)[0].parameters


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    ("key", "frames", "chunks", "dtype", "tolerance"),
    [
        ("sd-v1", None, 1, torch.float64, 1e-12),
        ("flux", None, 3, torch.float32, 1e-5),
        ("sd-v1", None, 1000, torch.float32, 1e-5),
        ("hunyuan-video", 5, 1, torch.float64, 1e-12),
        ("hunyuan-video", 1, 3, torch.float32, 1e-5),
        ("hunyuan-video", 17, 1000, torch.float32, 1e-5),  # over 16 frames take diffusers' framewise path
    ],
    indirect=["chunks"],
)
def test_equals_plain_diffusers(key: str, frames: int | None, dtype: torch.dtype, tolerance: float, load: Load) -> None:
    plain, low = (model.to(dtype) for model in load(key))
    for result, expected in zip(outputs(low, *inputs(key, frames)), outputs(plain, *inputs(key, frames)), strict=True):
        assert_close(result, expected, tolerance)


@pytest.mark.parametrize(
    ("key", "frames", "dtype"), [("sd-v1", None, torch.float16), ("hunyuan-video", 5, torch.bfloat16)]
)
def test_half_precision_is_as_near_to_float32_as_plain_diffusers(
    key: str, frames: int | None, dtype: torch.dtype, load: Load
) -> None:
    plain, low = load(key)
    expected = outputs(plain, *inputs(key, frames))
    plain_outputs = outputs(plain.to(dtype), *inputs(key, frames))
    low_outputs = outputs(low.to(dtype), *inputs(key, frames))
    for exact, in_plain, in_low in zip(expected, plain_outputs, low_outputs, strict=True):
        assert in_low.dtype == dtype
        assert error(in_low, exact) <= 1.2 * error(in_plain, exact)


def assert_close(result: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compare relative to the largest value, because these random weights give values well outside [-1, 1]."""
    torch.testing.assert_close(result, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


def error(result: Tensor, expected: Tensor) -> float:
    return (result.float() - expected).square().mean().sqrt().item()


@pytest.mark.parametrize(("key", "frames"), [("flux", None), ("hunyuan-video", 9)])
def test_tiling_and_slicing_combine_with_the_low_memory_pass(key: str, frames: int | None, load: Load) -> None:
    plain, low = load(key)
    for model in (plain, low):
        model.enable_tiling()
        model.enable_slicing()
        if key == "flux":
            model.tile_sample_min_size, model.tile_latent_min_size = 32, 4
        else:
            model.tile_sample_min_height = model.tile_sample_min_width = 32
            model.tile_sample_stride_height = model.tile_sample_stride_width = 24
    larger = inputs(key, frames, batch=2 if key == "flux" else 1, height=40, width=48)
    for result, expected in zip(outputs(low, *larger), outputs(plain, *larger), strict=True):
        assert_close(result, expected)


@pytest.mark.usefixtures("chunks")
def test_channels_last_is_kept(load: Load) -> None:
    plain, low = load("sd-v1")
    low.to(memory_format=torch.channels_last)
    (decoded, _), (expected, _) = outputs(low, *inputs("sd-v1", None)), outputs(plain, *inputs("sd-v1", None))
    assert_close(decoded, expected)
    assert decoded.is_contiguous(memory_format=torch.channels_last)


def test_the_variance_is_precise_for_a_large_mean() -> None:
    x = torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(0)) + 300
    mean, variance = low_memory._group_moments(x, groups=2)
    groups = x.double().view(2, 2, -1)
    torch.testing.assert_close(mean.view(2, 2, 4)[..., 0].double(), groups.mean(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.view(2, 2, 4)[..., 0].double(), groups.var(-1, correction=0), rtol=1e-5, atol=0)


@torch.no_grad()
def test_a_variance_that_overflows_is_not_finite() -> None:
    """Test that the service refuses such a request, and sends no gray image."""
    x = torch.tensor([1e30, -1e30]).repeat(16 * 32).view(1, 16, 8, 8)
    norm, conv = torch.nn.GroupNorm(4, 16), torch.nn.Conv2d(16, 4, 1)
    assert not low_memory._normalize_and_convolve(norm, torch.nn.Identity(), conv, x).isfinite().any()


def test_weights_keep_their_names(load: Load) -> None:
    plain, low = load("hunyuan-video")
    assert list(plain.state_dict()) == list(low.state_dict())


def test_other_models_are_not_changed() -> None:
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4
    )
    assert not reduce_peak(tiny)
    assert "forward" not in vars(tiny.decoder)


def test_the_peak_is_at_most_six_tenths() -> None:
    """Measure a published architecture in float32 with fake tensors, which have sizes only and take no memory."""
    with FakeTensorMode(), torch.inference_mode():
        model = diffusers.AutoencoderKL.from_config(MODELS["sd-v1"].published_config).eval()
        latents, pixels = inputs("sd-v1", None, 1, 256, 256)
        calls = (lambda: model.decode(latents), lambda: model.encode(pixels))
        plain = [peak_bytes(call) for call in calls]
        reduce_peak(model)
        low = [peak_bytes(call) for call in calls]
    assert low[0] <= 0.6 * plain[0]
    assert low[1] <= 0.6 * plain[1]


@pytest.mark.parametrize("task", ["decode", "encode"])
@pytest.mark.parametrize(
    ("key", "height", "width", "frames"), [("sd-v1", 1024, 1024, 1), ("hunyuan-video", 192, 320, 9)]
)
def test_the_peak_on_a_gpu_is_at_most_six_tenths(key: str, height: int, width: int, frames: int, task: Task) -> None:
    low, plain = (measured(MODELS[key], Case(task, mode, height, width, frames)) for mode in (Mode.REDUCED, Mode.FULL))
    assert low <= 0.6 * plain


def test_fake_tensors_give_the_same_peak_as_real_tensors() -> None:
    peaks = []
    for mode in (FakeTensorMode(), nullcontext()):
        with mode, torch.inference_mode():
            model = diffusers.AutoencoderKL.from_config({**MODELS["sd-v1"].published_config, **SMALL}).eval()
            latents = torch.zeros(1, 4, 16, 16)
            for reduce in (False, True):
                if reduce:
                    reduce_peak(model)
                peaks.append(peak_bytes(lambda model=model, latents=latents: model.decode(latents)))
    assert peaks[:2] == peaks[2:]
