"""Tests of the kernels for GPUs: in Triton's interpreter against operators of torch, and compiled without a GPU.

With TRITON_INTERPRET=0 in the environment they run on a GPU.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from handlers.serving.vae.fast import kernels
from tests.support import forked, reference_kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),  # of masked values
]
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
"""Device of the kernels. conftest.py has Triton interpret them unless the environment says otherwise."""


def normal(*shape: int, mean: float = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE) + mean


def assert_equal(result: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (16, 33)])
def test_group_norm_is_precise_for_a_large_mean(height: int, width: int) -> None:
    x, weight, bias, input_bias = normal(2, 64, height, width, mean=100), normal(64), normal(64), normal(64)
    x = kernels.channels_last(x)
    expected = reference_kernels.group_norm(x.double(), weight, bias, 16, 1e-6, input_bias)
    assert_equal(kernels.group_norm(x, weight, bias, 16, 1e-6, input_bias), expected, 2e-4)
    assert kernels.group_norm(x, weight, bias, 16, 1e-6, input_bias, in_place=True).data_ptr() == x.data_ptr()
    assert_equal(x, expected, 2e-4)


def test_the_kernels_of_images_copy_another_layout() -> None:
    x, y, weight = normal(2, 16, 6, 5), normal(2, 16, 6, 5, mean=1), normal(16)
    for layout in (torch.contiguous_format, torch.channels_last):
        a, b = (tensor.clone(memory_format=layout) for tensor in (x, y))
        expected = reference_kernels.group_norm(a.double(), weight, weight, 4, 1e-6)
        assert_equal(kernels.group_norm(a, weight, weight, 4, 1e-6), expected)
        assert_equal(kernels.add(a, weight, b), x.double() + y + weight[:, None, None])
        assert_equal(kernels.interleave(b, weight[:4]), reference_kernels.interleave(y.double(), weight[:4]))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (17, 32)])
def test_interleaved_subpixels_have_all_pixels(height: int, width: int) -> None:
    subpixels, bias = normal(2, 4 * 32, height + 1, width + 1), normal(32)
    result = kernels.interleave(kernels.channels_last(subpixels), bias)
    assert result.shape == (2, 32, 2 * height, 2 * width)
    assert_equal(result, reference_kernels.interleave(subpixels.double(), bias))


@pytest.mark.parametrize("width", [5, 8])  # one value at a time, and eight
@pytest.mark.parametrize("is_slice", [True, False])
def test_rms_norm_of_any_frames(width: int, is_slice: bool) -> None:
    x, weight, bias = normal(2, 24, 4, 3, width), normal(24, 1, 1, 1), normal(24, 1, 1, 1)
    x = x[:, :, 1:3] if is_slice else x.transpose(-1, -2)
    result = kernels.rms_norm(x, weight, bias, 24**0.5)
    assert result.is_contiguous()
    expected = reference_kernels.rms_norm(x.double(), weight, bias, 24**0.5)
    assert_equal(result, expected)
    assert_equal(kernels.rms_norm(x, weight, bias, 24**0.5, room=2)[:, :, 2:], expected)


COMPILE = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]:
    del sys.modules[name]
from tests.support import compiled_kernels
compiled_kernels.main()
"""
"""Code of a forked process. It imports Triton anew, because a forked Triton is interpreted, except for its C++ part."""


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    settings = {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1", "TRITON_ALWAYS_COMPILE": "1"}
    status, output, errors = forked.run("-c", COMPILE, **settings)
    assert status == 0, errors
    return json.loads(output)


IMAGES = {"_partial_moments": (4, 0), "_apply": (4, 4), "_add": (8, 4), "_interleave": (4, 4), "_rms_norm": (4, 4)}
"""Loads and stores of 16 bytes in a thread of each kernel that reads an image: 32 values of half precision."""


def test_the_compiled_kernels_move_16_bytes_at_a_time(compiled: dict[str, dict[str, Any]]) -> None:
    names = {label.split()[1] for label in compiled}
    assert names == {*IMAGES, "_merge_moments"}
    assert {label.split()[0] for label in compiled} == {"75", "80", "90"}
    for label, kernel in compiled.items():
        name = label.split()[1]
        if name in IMAGES:
            loads, stores = IMAGES[name]
            assert kernel["loads"].count(128) >= loads, label
            assert kernel["stores"].count(128) == stores, label


def test_the_compiled_kernels_fit_in_registers(compiled: dict[str, dict[str, Any]]) -> None:
    for label, kernel in compiled.items():
        assert kernel["registers"] <= 128, label
        assert kernel["spilled"] == 0, label
