"""Convolutions of 3x3 with a quarter of the multiplications, for images of many channels in float32.

Winograd's algorithm F(4x4, 3x3), from Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015): a
tile of 6x6 pixels and a kernel of 3x3 are transformed to 36 values each. Their products, summed over the channels, are
transformed back to 4x4 results. So 16 results take 36 multiplications instead of 144. The sums over channels are matrix
products, which take most of the time. The transforms pay from about `MIN_CHANNELS` channels on.

The rounding error is about 1.6e-6 of the results' standard deviation; a direct convolution has 0.2e-6 to 1.2e-6. With
the usual points, 0, 1, -1, 2 and -2, it would be 2.4e-6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from handlers.serving.vae.stop import check_wanted

MIN_CHANNELS = 96
"""Least geometric mean of the channels of inputs and results. With fewer, the transforms take longer than the
multiplications that they save.
"""
MIN_PIXELS = 32 * 32
"""Least pixels of a frame. With fewer, the kernel's transform takes longer than the multiplications that it saves."""
RESULTS, TAPS = 4, 3
TILE = RESULTS + TAPS - 1
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
"""Points at which the polynomials of tiles and kernels are evaluated, besides infinity."""
BLOCK = 2**20
"""Most transformed values at a time, in one row of tiles or more: 4 MB of float32, which stay in a processor's cache.
"""


def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Return the transforms of tiles [36, 36], of kernels [36, 9] and of products [16, 36], in float64."""

    def evaluate(terms: int) -> Tensor:
        """Return the matrix that evaluates a polynomial of so many terms at each point."""
        at_infinity = torch.eye(terms, dtype=torch.float64)[-1:]
        return torch.cat([torch.tensor(POINTS, dtype=torch.float64)[:, None] ** torch.arange(terms), at_infinity])

    tiles = torch.linalg.inv(evaluate(TILE)).T
    scale = tiles.abs().amax(1, keepdim=True)  # rows of one size, for less rounding error
    one_dimension = (tiles / scale, evaluate(TAPS) * scale, evaluate(RESULTS).T)
    of_tiles, of_kernels, of_products = (torch.kron(matrix, matrix).contiguous() for matrix in one_dimension)
    return of_tiles, of_kernels, of_products


MATRICES = {dtype: tuple(matrix.to(dtype) for matrix in _matrices()) for dtype in (torch.float32, torch.float64)}


def is_faster(weight: Tensor, pixels: int = MIN_PIXELS) -> bool:
    """Return whether frames of so many pixels are convolved faster by this module than by torch."""
    return (
        weight.dtype in MATRICES
        and weight.shape[-2:] == (TAPS, TAPS)
        and weight.shape[:2].numel() >= MIN_CHANNELS**2
        and pixels >= MIN_PIXELS
    )


def workspace(weight: Tensor) -> int:
    """Return the bytes that a convolution takes beside its inputs and its result."""
    return weight.element_size() * (4 * BLOCK + TILE**2 * weight[..., 0, 0].numel())


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Convolve with a padding of one zero on each side of height and width, and write the result to `out`.

    Args:
        x: frames [F, H, W, C], in float32 or float64.
        weight: [K, C, T, 3, 3]; each result is a sum over T frames.
        bias: [K].
        out: [F - T + 1, H, W, K], of any strides.

    Raises:
        PassStopped: nobody waits for the result any more.
    """
    frames, height, width, channels = x.shape
    of_tiles, of_kernels, of_products = MATRICES[x.dtype]
    kernels = [_transform(of_kernels, kernel) for kernel in weight.permute(2, 3, 4, 0, 1)]
    results, total, columns = frames - len(kernels) + 1, -(-height // RESULTS), -(-width // RESULTS)
    # Equal blocks of rows; the last may repeat rows of the one before. All use the same memory.
    blocks = -(-(TILE**2) * frames * total * columns * max(weight.shape[:2]) // BLOCK)
    rows = -(-total // blocks)
    padded = x.new_zeros(frames, RESULTS * rows + 2, RESULTS * columns + 2, channels)
    tiles = x.new_empty(TILE, TILE, frames, rows, columns, channels)
    transformed = x.new_empty(TILE**2, frames * rows * columns, channels)
    products = x.new_empty(TILE**2, results * rows * columns, len(weight))
    block = x.new_empty(RESULTS, RESULTS, results, rows, columns, len(weight))
    for first in range(0, total, rows):
        check_wanted()
        top = RESULTS * min(first, total - rows)
        _read_tiles(x, top, padded, tiles)
        torch.mm(of_tiles, tiles.view(TILE**2, -1), out=transformed.view(TILE**2, -1))
        for time, kernel in enumerate(kernels):
            inputs = transformed[:, time * rows * columns :][:, : results * rows * columns]
            torch.baddbmm(products, inputs, kernel.mT, beta=time > 0, out=products)
        torch.mm(of_products, products.view(TILE**2, -1), out=block.view(RESULTS**2, -1))
        _write(block, bias, out[:, top : top + RESULTS * rows])


def _read_tiles(x: Tensor, top: int, padded: Tensor, tiles: Tensor) -> None:
    """Copy lines of frames [F, H, W, C], from `top` on, to `padded`, and their overlapping tiles to `tiles`.

    `padded` is zero where no earlier block wrote to it.
    """
    _, height, width, _ = x.shape
    first, last = max(top - 1, 0), min(top + padded.shape[1] - 1, height)
    padded[:, first - top + 1 : last - top + 1, 1 : width + 1] = x[:, first:last]
    padded[:, last - top + 1 :] = 0
    frame, line, pixel, _ = padded.stride()
    strides = (line, pixel, frame, RESULTS * line, RESULTS * pixel, 1)
    tiles.copy_(padded.as_strided(tiles.shape, strides))


def _write(block: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write results [4, 4, F, rows, columns, K] to lines [F, H, W, K], which may end within the last tiles."""
    block = block.permute(2, 3, 0, 4, 1, 5)
    frames, rows, _, columns, _, channels = block.shape
    if out.shape[1:3] == (RESULTS * rows, RESULTS * columns):
        out = out.unflatten(2, (columns, RESULTS)).unflatten(1, (rows, RESULTS))
    else:
        block = block.reshape(frames, RESULTS * rows, RESULTS * columns, channels)[:, : out.shape[1], : out.shape[2]]
    if bias is None:
        out.copy_(block)
    else:
        torch.add(block, bias, out=out)


def _transform(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply the first two dimensions of x, taken as one, with a matrix."""
    return (matrix @ x.reshape(matrix.shape[1], -1)).view(len(matrix), *x.shape[2:])
