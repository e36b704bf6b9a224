"""Tests of the fast pass: it gives diffusers' results, and runs only if a check on the device found it correct and
faster.
"""

from __future__ import annotations

import os
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peak import peak_bytes
from handlers import MODELS
from handlers.serving.errors import RequestError
from handlers.serving.pipeline import Pipeline
from handlers.serving.settings import Settings
from handlers.serving.vae import blocks as coders
from handlers.serving.vae.autoencoder import DecodeOptions, EncodeOptions, has_frames
from handlers.serving.vae.chunks import decode_chunks, join
from handlers.serving.vae.fast import check as fast_check
from handlers.serving.vae.fast import kernels
from handlers.serving.vae.fast.check import FastPasses, fast_pass
from handlers.serving.vae.fast.cpu import CpuPass
from handlers.serving.vae.fast.forward import FastPass
from handlers.serving.vae.fast.fused import FusedPass
from handlers.serving.vae.memory import Mode
from handlers.serving.vae.vae import VAE
from tests.support.checkpoints import build
from tests.support.messages import send

pytestmark = pytest.mark.slow

CASES = [
    ("sd-v1", None),
    ("flux2", None),
    ("wan-2.1", 3),
    ("qwen-image", 1),
    ("hunyuan-video", 1),
    ("hunyuan-video", 3),
]
"""Models of each architecture, and numbers of latent frames: one, and several."""
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
"""Device of the kernels. conftest.py has Triton interpret them unless the environment says otherwise."""

small = cache(build)


def inputs(key: str, frames: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a batch of two, with sides that are neither even nor equal."""
    model, generator = MODELS[key], torch.Generator().manual_seed(0)
    latents = torch.randn(2, model.latent_channels, *([frames] if frames else []), 5, 7, generator=generator)
    sides = [size * model.vae_scale_factor for size in (5, 7)]
    video = [(frames - 1) * model.frame_factor + 1] if frames else []
    pixels = torch.rand(2, 3, *video, *sides, generator=generator) * 2 - 1
    return {"decode": latents.to(dtype), "encode": pixels.to(dtype)}


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    encoded = model.encode(inputs["encode"], return_dict=False)[0]
    return {"decode": join(decode_chunks(model, inputs["decode"])), "encode": getattr(encoded, "parameters", encoded)}


def both(key: str, frames: int | None, dtype: torch.dtype, fast_class: type[FastPass] = FastPass) -> Any:
    """Return the results of diffusers, of the fast pass, and of diffusers in float64, for each task."""
    device = DEVICE if fast_class is FusedPass else "cpu"
    model = deepcopy(small(key)).to(device, dtype)
    fast, tensors = fast_class(model), {task: tensor.to(device) for task, tensor in inputs(key, frames, dtype).items()}
    fast.prepare()
    own = outputs(model, tensors)
    with fast.installed():
        result = outputs(model, tensors)
    assert_equal(outputs(model, tensors), own)  # the fast pass leaves no trace
    exact = outputs(model.double(), {task: tensor.double() for task, tensor in tensors.items()})
    return own, result, exact


def assert_equal(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for task in result:
        assert torch.equal(result[task], expected[task]), task


def error(result: Tensor, exact: Tensor) -> float:
    return (result.double() - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("fast_class", [FastPass, CpuPass])
@pytest.mark.parametrize(("key", "frames"), CASES)
def test_the_fast_pass_is_the_same_algebra(key: str, frames: int | None, fast_class: type[FastPass]) -> None:
    own, result, _ = both(key, frames, torch.float64, fast_class)
    for task in own:  # Wan's upsampling goes through float32 in diffusers
        tolerance = 1e-6 if task == "decode" and coders.is_causal(coders.coders_of(small(key))) else 1e-12
        torch.testing.assert_close(result[task], own[task], atol=tolerance * own[task].abs().max().item(), rtol=0)


@pytest.mark.parametrize(("key", "frames"), CASES)
@pytest.mark.parametrize("fast_class", [FastPass, CpuPass])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fast_pass_is_as_exact_as_diffusers(
    key: str, frames: int | None, dtype: torch.dtype, fast_class: type[FastPass]
) -> None:
    own, result, exact = both(key, frames, dtype, fast_class)
    for task in own:  # few channels average little; the check at load allows 0.5 dB at published sizes
        assert result[task].dtype == dtype
        assert error(result[task], exact[task]) <= 1.2 * error(own[task], exact[task])


@pytest.mark.parametrize(("key", "frames"), [("wan-2.1", 3), ("wan-2.2", 3), ("qwen-image", 1)])
def test_wan_without_folding_equals_diffusers_bit_for_bit(key: str, frames: int) -> None:
    model, tensors = small(key), inputs(key, frames, torch.float32)
    own = outputs(model, tensors)
    with FastPass(model, fold=False).installed():
        assert_equal(outputs(model, tensors), own)


# Triton's interpreter truncates bfloat16 where hardware rounds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16 if DEVICE == "cpu" else torch.bfloat16])
@pytest.mark.parametrize(("key", "frames"), [("sd-v1", None), ("wan-2.1", 3)])
def test_the_kernels_are_as_exact_as_diffusers(key: str, frames: int | None, dtype: torch.dtype) -> None:
    own, result, exact = both(key, frames, dtype, FusedPass)
    for task in own:
        # both errors are float32 rounding, which differs by processor: 1.25 on an AMD without AVX-512
        assert error(result[task], exact[task]) <= 1.5 * error(own[task], exact[task])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # from the interpreter, masked values
@pytest.mark.parametrize(("height", "width"), [(3, 5), (16, 33)])
def test_group_norm_is_precise_for_a_large_mean(height: int, width: int) -> None:
    x = torch.randn(2, 64, height, width, device=DEVICE) + 100
    x, bias = x.contiguous(memory_format=torch.channels_last), torch.randn(64, device=DEVICE)
    norm = torch.nn.GroupNorm(16, 64, device=DEVICE)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = torch.nn.functional.silu(norm.double()((x + bias[:, None, None]).double()))
    norm.float()
    result = kernels.group_norm(x, norm.weight, norm.bias, 16, norm.eps, torch.empty_like(x), input_bias=bias)
    torch.testing.assert_close(result.double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("fast_class", [FastPass, CpuPass])
@pytest.mark.parametrize("key", ["sd-v1", "wan-2.1", "hunyuan-video"])
def test_the_fast_pass_takes_no_more_memory_than_diffusers(key: str, fast_class: type[FastPass]) -> None:
    model = small(key)
    fast, tensors = fast_class(model), inputs(key, 3 if has_frames(model) else None, torch.float32)
    own = peak_bytes(lambda: outputs(model, tensors))
    with fast.installed():
        assert peak_bytes(lambda: outputs(model, tensors)) <= own


def test_other_architectures_have_no_fast_pass() -> None:
    assert fast_pass(small("taesd")) is None
    passes = FastPasses(small("taesd"), MODELS["taesd"], wanted=True)
    assert set(passes.verdicts.values()) == {"off: this architecture has none"}
    assert list(passes.checks()) == []


@pytest.fixture
def vae() -> VAE:
    return VAE(deepcopy(small("sd-v1")), MODELS["sd-v1"], fast=True)


def run_checks(vae: VAE, monkeypatch: pytest.MonkeyPatch, ratio: float = 0.5) -> dict[str, str]:
    """Run the check as if the fast pass took `ratio` of the time of diffusers'."""
    compare = fast_check._compare
    monkeypatch.setattr(fast_check, "_compare", lambda *arguments: (ratio, *compare(*arguments)[1:]))
    for check in vae.fast.checks():
        check()
    return vae.fast.verdicts


def modes(vae: VAE, exact: bool = False) -> list[Mode]:
    tensors = inputs("sd-v1", None, vae.dtype)
    return [
        vae.decode(tensors["decode"], options=DecodeOptions(exact=exact))[1],
        vae.encode(tensors["encode"], EncodeOptions(exact=exact))[1],
    ]


def test_a_correct_and_faster_pass_is_used(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(vae.fast.verdicts.values()) == {"off: not checked yet"}
    assert modes(vae) == [Mode.FULL, Mode.FULL]
    verdicts = run_checks(vae, monkeypatch)
    assert all(verdict.startswith("on: 0.50 of diffusers' time at 256x256, ") for verdict in verdicts.values())
    assert modes(vae) == [Mode.FAST, Mode.FAST]
    assert modes(vae, exact=True) == [Mode.FULL, Mode.FULL]


def test_the_check_decodes_whole_images_after_a_request_in_tiles(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    vae.model.use_tiling = True
    monkeypatch.setattr(vae.model, "tiled_decode", None)
    monkeypatch.setattr(vae.model, "tile_latent_min_size", 2)
    assert run_checks(vae, monkeypatch)["decode"].startswith("on: ")


def test_a_slower_pass_is_not_used(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = run_checks(vae, monkeypatch, ratio=1.5)
    assert all(verdict.startswith("off: 1.50 of diffusers' time at 256x256") for verdict in verdicts.values())
    assert modes(vae) == [Mode.FULL, Mode.FULL]


def test_a_wrong_pass_is_not_used(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    for phases in vae.fast.fast._folded.values():
        phases[0][1].mul_(1.01)
    verdicts = run_checks(vae, monkeypatch)
    assert "dB further from exact than diffusers at 128x128" in verdicts["decode"]
    assert verdicts["encode"].startswith("on: ")  # a FastPass that folds nothing
    assert modes(vae) == [Mode.FULL, Mode.FAST]


@pytest.mark.parametrize("method", ["prepare", "_residual"])
def test_a_failing_pass_is_not_used(vae: VAE, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(vae.fast.fast, method, fail)
    verdicts = run_checks(vae, monkeypatch)
    assert set(verdicts.values()) == {"off: RuntimeError: no compiler here"}
    assert modes(vae) == [Mode.FULL, Mode.FULL]


def test_an_overflow_runs_in_float32(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    run_checks(vae, monkeypatch)
    assert vae.fast.is_on("decode", torch.float32)
    assert not vae.fast.is_on("decode", torch.float64)


def test_exact_is_refused_if_it_does_not_fit(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handlers.serving.vae.heap.HEAP.capacity", lambda: 1000)
    with pytest.raises(
        RequestError, match=r"in diffusers' own pass, .*; without `exact` \(or VAE_EXACT\) it may take less"
    ) as caught:
        modes(vae, exact=True)
    assert caught.value.status == 422


def test_exact_is_refused_for_a_batch_that_diffusers_cannot_run() -> None:
    class OneByOne(MODELS["sd-v1"]):
        runs_batches = False

    vae = VAE(small("sd-v1"), OneByOne)
    assert modes(vae) == [Mode.SLICED, Mode.SLICED]
    with pytest.raises(RequestError, match="`exact`: diffusers runs no batch through this model; send one at a time"):
        modes(vae, exact=True)


def test_the_settings_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_FAST", "1")
    assert Settings.load().fast
    monkeypatch.setenv("VAE_EXACT", "1")
    with pytest.raises(ValueError, match="VAE_FAST and VAE_EXACT: only one can be on"):
        Settings.load()


def test_requests_are_served_before_and_after_the_check(vae: VAE) -> None:
    vae.fast.fast.prepare = lambda: None
    pipeline = Pipeline([vae], Settings(fast=True))
    latents = inputs("sd-v1", None, torch.float32)["decode"]
    own = send(pipeline, latents, output_type="pt", exact=True)
    deadline = 60
    while "off: not checked yet" in vae.fast.verdicts.values() and deadline:
        torch.testing.assert_close(send(pipeline, latents, output_type="pt"), own, atol=1e-4, rtol=0)
        deadline -= 1
    torch.testing.assert_close(send(pipeline, latents, output_type="pt"), own, atol=1e-4, rtol=0)


def test_a_copy_of_the_model_is_independent() -> None:
    model = small("sd-v1")
    with FastPass(model).installed():
        pass
    assert not [name for name, module in deepcopy(model).named_modules() if "forward" in vars(module)]
