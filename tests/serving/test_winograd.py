"""Tests of Winograd's convolutions against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peak import peak_bytes
from handlers.serving.vae.fast import winograd
from handlers.serving.vae.fast.winograd import convolve, is_faster, workspace
from handlers.serving.vae.stop import PassStopped, stoppable


def tensors(frames: int, height: int, width: int, taps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return frames [F, H, W, 5], a kernel [7, 5, T, 3, 3] and a bias [7]."""
    generator = torch.Generator().manual_seed(0)
    shapes = (frames, height, width, 5), (7, 5, taps, 3, 3), (7,)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def expected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv3d(x.movedim(-1, 0), weight, bias, padding=(0, 1, 1)).movedim(0, -1)


def result(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_full((len(x) - weight.shape[2] + 1, *x.shape[1:3], len(weight)), torch.nan)
    convolve(x, weight, bias, out)
    return out


@pytest.mark.parametrize("block", [1, 2**20])
@pytest.mark.parametrize(
    ("frames", "height", "width", "taps"), [(1, 1, 1, 1), (2, 4, 8, 1), (1, 13, 6, 1), (3, 5, 7, 3), (5, 9, 9, 3)]
)
def test_any_size_equals_torch(
    frames: int, height: int, width: int, taps: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test all rows at once, and each row of tiles alone."""
    monkeypatch.setattr(winograd, "BLOCK", block)
    x, weight, bias = tensors(frames, height, width, taps)
    torch.testing.assert_close(result(x, weight, bias), expected(x, weight, bias), atol=1e-12, rtol=0)
    torch.testing.assert_close(result(x, weight, None), expected(x, weight, None), atol=1e-12, rtol=0)


def test_frames_and_results_may_have_any_strides() -> None:
    x, weight, bias = tensors(2, 6, 10, 1)
    out = torch.full((2, 7, 12, 20), torch.nan, dtype=x.dtype)
    convolve(x.movedim(-1, 1).contiguous().movedim(1, -1), weight, bias, out[..., ::2, 1::2].movedim(1, -1))
    torch.testing.assert_close(out[..., ::2, 1::2].movedim(1, -1), expected(x, weight, bias), atol=1e-12, rtol=0)
    assert out.isnan().sum() == out.numel() * 3 / 4


def test_the_rounding_error_in_float32_is_small() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 16, 256, generator=generator)
    weight = torch.randn(256, 256, 1, 3, 3, generator=generator)
    exact = expected(x.double(), weight.double(), None)
    error = (result(x, weight, None) - exact).square().mean().sqrt() / exact.std()
    assert error < 2e-6


def test_few_channels_few_pixels_other_kernels_and_half_precision_are_left_to_torch() -> None:
    weight = torch.empty(winograd.MIN_CHANNELS, winograd.MIN_CHANNELS, 3, 3)
    assert is_faster(weight)
    assert is_faster(weight.unsqueeze(2))
    assert is_faster(torch.empty(2 * winograd.MIN_CHANNELS, winograd.MIN_CHANNELS // 2, 3, 3))
    assert not is_faster(weight, 32 * 32 - 1)
    assert not is_faster(weight[1:])
    assert not is_faster(weight[:, 1:])
    assert not is_faster(weight[..., :1, :1])
    assert not is_faster(weight.bfloat16())


def test_the_workspace_is_what_a_convolution_takes() -> None:
    x, weight = torch.randn(1, 100, 100, 96), torch.randn(96, 96, 1, 3, 3)
    out = torch.empty(1, 100, 100, 96)
    assert 0.5 * workspace(weight) < peak_bytes(lambda: convolve(x, weight, None, out)) < workspace(weight)


def test_an_abandoned_convolution_stops_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "BLOCK", 1)
    x, weight, bias = tensors(1, 12, 4, 1)
    polls = iter([False, False, True])
    out = torch.full((1, 12, 4, 7), torch.nan, dtype=x.dtype)
    with stoppable(lambda: next(polls)), pytest.raises(PassStopped):
        convolve(x, weight, bias, out)
    assert not out[:, :8].isnan().any()
    assert out[:, 8:].isnan().all()
