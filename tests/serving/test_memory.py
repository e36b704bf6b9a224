import pytest

from handlers.serving.layout import Layout
from handlers.serving.memory import Estimate, MemoryUse, Mode, choose_modes

IMAGE = Layout("image", latent_channels=4, vae_scale_factor=8)
VIDEO = Layout("video", latent_channels=16, vae_scale_factor=8, frame_factor=4)


@pytest.mark.parametrize(
    ("batch", "free", "expected"),
    [
        (1, 1000, [Mode.FULL, Mode.TILED]),
        (1, 99, [Mode.TILED]),
        (1, 1, [Mode.TILED]),  # it is tried all the same: an estimate may be too high
        (4, 400, [Mode.FULL, Mode.SLICED, Mode.TILED]),
        (4, 399, [Mode.SLICED, Mode.TILED]),
        (4, 99, [Mode.TILED]),
    ],
)
def test_the_best_mode_that_fits_comes_first(batch: int, free: int, expected: list[Mode]) -> None:
    assert choose_modes(Estimate(full=100, tiled=10), batch, free) == expected


def test_estimates_grow_with_the_pixels_of_the_result() -> None:
    use = MemoryUse(decode=500, encode=300, tile_pixels=64 * 64)
    assert use.estimate("decode", IMAGE, (2, 4, 128, 128), itemsize=2).full == 1024 * 1024 * 500 * 2
    assert use.estimate("encode", IMAGE, (1, 3, 512, 256), itemsize=4).full == 512 * 256 * 300 * 4
    assert use.estimate("decode", VIDEO, (1, 16, 3, 8, 8), itemsize=4).full == 9 * 64 * 64 * 500 * 4


def test_tiles_need_one_tile_and_the_picture() -> None:
    use = MemoryUse(decode=500, encode=300, tile_pixels=64 * 64)
    assert use.estimate("decode", IMAGE, (1, 4, 128, 128), 2).tiled == 64 * 64 * 1000 + 1024 * 1024 * 9 * 2
