"""Tests of the fast passes on a GPU, with operators of torch in place of the kernels (`test_kernels` tests those)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch._subclasses import FakeTensorMode

from benchmarks.peak import peak_bytes
from handlers import MODELS
from handlers.serving.vae import blocks
from handlers.serving.vae.fast import fused, kernels
from handlers.serving.vae.fast.check import FastPasses, Steps
from handlers.serving.vae.fast.forward import FastPass
from handlers.serving.vae.fast.fused import CausalPass, ImagePass, fused_pass
from tests.serving.test_fast import both, errors, inputs, outputs, small
from tests.support import reference_kernels

pytestmark = pytest.mark.slow

CASES = [
    ("sd-v1", None, ImagePass),
    ("flux2", None, ImagePass),
    ("wan-2.1", 2, CausalPass),
    ("qwen-image", 1, CausalPass),
]


@pytest.fixture(autouse=True)
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("group_norm", "add", "interleave", "rms_norm"):
        monkeypatch.setattr(kernels, name, getattr(reference_kernels, name))


@pytest.mark.parametrize(("key", "frames", "fast_class"), CASES)
def test_the_pass_is_the_same_algebra(key: str, frames: int | None, fast_class: type[FastPass]) -> None:
    assert type(fused_pass(small(key))) is fast_class
    own, result = both(key, frames, torch.float64, fused_pass)
    for task in own:  # Wan's upsampling goes through float32 in diffusers
        tolerance = 1e-6 if task == "decode" and fast_class is CausalPass else 1e-12
        torch.testing.assert_close(result[task], own[task], atol=tolerance * own[task].abs().max().item(), rtol=0)


@pytest.mark.parametrize(("key", "frames", "fast_class"), CASES)
def test_the_pass_is_as_exact_as_diffusers(key: str, frames: int | None, fast_class: type[FastPass]) -> None:
    dtype = getattr(torch, MODELS[key].dtype)
    for fast, plain in errors(key, frames, dtype, fused_pass):
        assert fast <= 1.3 * plain  # the operators round after each step, the kernels once


def test_every_tensor_of_an_image_stays_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy to this layout would cost a pass through memory."""
    copies = []

    def group_norm(x: Tensor, *arguments: Any, **more: Any) -> Tensor:
        if not x.is_contiguous(memory_format=torch.channels_last):
            copies.append(tuple(x.shape))
        return reference_kernels.group_norm(x, *arguments, **more)

    monkeypatch.setattr(kernels, "group_norm", group_norm)
    model = small("sd-v1")
    with ImagePass(model).installed():
        outputs(model, inputs("sd-v1", None, torch.float32))
    assert not copies


def test_a_pass_frees_what_it_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "group_norm", lambda x, *arguments: x if arguments[-1] else torch.empty_like(x))
    monkeypatch.setattr(kernels, "add", lambda x, *arguments: x)
    monkeypatch.setattr(
        kernels, "interleave", lambda x, bias: x.new_empty(1, len(bias), *(2 * n - 2 for n in x.shape[2:]))
    )
    with FakeTensorMode(), torch.no_grad():
        model = diffusers.AutoencoderKL.from_config(MODELS["sd-v1"].published_config)
        fast = ImagePass(model)
        for task, data in (("decode", torch.empty(1, 4, 32, 32)), ("encode", torch.empty(1, 3, 256, 256))):
            own = peak_bytes(lambda task=task, data=data: getattr(model, task)(data))
            with fast.installed():
                assert peak_bytes(lambda task=task, data=data: getattr(model, task)(data)) <= 0.7 * own, (
                    task
                )  # 4 tensors of 6


def attention(channels: int, dtype: torch.dtype) -> Attention:
    torch.manual_seed(0)
    module = Attention(
        channels,
        heads=1,
        dim_head=channels,
        norm_num_groups=32,
        bias=True,
        residual_connection=True,
        _from_deprecated_attn_block=True,
    )
    return module.to(dtype).requires_grad_(False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_attention_in_slices_is_diffusers(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = attention(512, dtype)
    x = kernels.channels_last(torch.randn(2, 512, 5, 7, dtype=torch.float64)).to(dtype)
    expected = module.double()(x.double())
    module.to(dtype)
    monkeypatch.setattr(fused, "SCORES", 10 * 35)  # slices of 10, 10, 10 and 5 queries
    monkeypatch.setattr(blocks, "attend", None)
    result = fused.attend(module, x)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert (result.double() - expected).square().mean().sqrt() <= tolerance * expected.std()


@pytest.mark.parametrize(("channels", "has_wide_products"), [(256, True), (512, False)])
def test_other_attention_is_torchs(channels: int, has_wide_products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "has_wide_products", lambda: has_wide_products)
    module, x = attention(channels, torch.float64), torch.randn(1, channels, 3, 2, dtype=torch.float64)
    assert torch.equal(fused.attend(module, x), module(x))


def test_without_a_compiler_the_pass_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    fast = fused_pass(small("sd-v1"))
    assert type(fast) is FastPass

    def judge(*_: object) -> Steps[tuple[bool, str]]:
        yield
        return True, "0.90 of diffusers' time"

    monkeypatch.setattr(FastPasses, "_judge", judge)
    passes = FastPasses(small("sd-v1"), MODELS["sd-v1"], wanted=True)
    passes.candidates["decode"] = [fast]
    list(passes.check())
    assert passes.verdicts["encode"] == "on: 0.90 of diffusers' time"
    assert passes.verdicts["decode"] == (
        "on: 0.90 of diffusers' time; without the kernels, because Triton finds no C compiler (gcc, clang or CC)"
    )


def test_a_compiler_needs_pythons_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert fused.missing_compiler() == f"Triton needs Python's headers ({tmp_path}/Python.h)"
    (tmp_path / "Python.h").touch()
    assert fused.missing_compiler() is None


def test_no_tensor_of_an_image_has_2_to_the_31_values() -> None:
    """From there on older versions of cuDNN refuse, and torch's own convolution has another layout."""
    with FakeTensorMode():
        fast = ImagePass(diffusers.AutoencoderKL.from_config(MODELS["sd-v1"].published_config))
    assert 2048 * 2048 < fast.most_pixels == (2**31 - 1) // 256


def test_a_pass_starts_kernels_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.device] = []

    @contextmanager
    def use(device: torch.device) -> Iterator[None]:
        used.append(device)
        yield
        used.append(torch.device("cpu"))

    monkeypatch.setattr(torch.cuda, "device", use)
    fast = fused_pass(small("sd-v1"))
    fast.device = torch.device("cuda:1")
    with fast.installed():
        assert used == [fast.device]
    assert used == [fast.device, torch.device("cpu")]


def test_hunyuan_video_has_no_kernels() -> None:
    assert type(fused_pass(small("hunyuan-video"))) is FastPass


def test_preparing_runs_each_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, set[int]] = {}

    def start(name: str, x: Tensor, *arguments: Any, **more: Any) -> Tensor:
        started.setdefault(name, set()).add(x.shape[1])
        return getattr(reference_kernels, name)(x, *arguments, **more)

    for name in ("group_norm", "add", "interleave", "rms_norm"):
        monkeypatch.setattr(kernels, name, lambda *a, name=name, **k: start(name, *a, **k))
    for key in ("sd-v1", "wan-2.1"):
        fast = fused_pass(small(key))
        started.clear()
        fast.prepare()
        prepared = deepcopy(started)
        started.clear()
        with fast.installed():
            outputs(fast.model, inputs(key, 3 if key == "wan-2.1" else None, torch.float32))
        assert prepared == started
