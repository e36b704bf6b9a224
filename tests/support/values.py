"""Comparison of an endpoint's values with diffusers' own."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

TOLERANCE = 1e-5 if os.environ["VAE_FAST"] == "0" else 1e-4
"""Difference that rounding makes at most, relative to the largest value. That of the fast pass is larger."""


def assert_same(result: Any, expected: Any) -> None:
    """Assert that tensors, arrays or images are equal bit for bit.

    With `VAE_FAST=1` they may differ by the rounding of the fast pass, and values of 8 bits by one.
    """
    result, expected = np.asarray(result), np.asarray(expected)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    if os.environ["VAE_FAST"] == "0":
        assert np.array_equal(result, expected)
    elif result.dtype == np.uint8:
        assert np.abs(result.astype(int) - expected).max() <= 1
    else:
        np.testing.assert_allclose(result, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
