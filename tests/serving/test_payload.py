import io

import numpy as np
import pytest
from PIL import Image

from handlers.serving.payload import read_image, upright_rgb


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (16, 8), "red")
    image.paste("blue", (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    upright = upright_rgb(read_image(buffer.getvalue()))
    assert upright.size == (8, 16)
    assert (upright.getpixel((4, 1)), upright.getpixel((4, 14))) == ((0, 0, 255), (255, 0, 0))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), 255),
        (Image.new("LA", (8, 8), (0, 0)), 255),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 255)), 0),
        (Image.new("L", (8, 8), 7), 7),
        (Image.new("I;16", (8, 8), 255 * 257), 255),
        (Image.new("1", (8, 8), 1), 255),
    ],
)
def test_every_mode_becomes_rgb_on_white(image: Image.Image, expected: int) -> None:
    pixels = np.asarray(upright_rgb(image))
    assert pixels.shape == (8, 8, 3)
    assert (pixels == expected).all()


def test_transparent_palette() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", transparency=0)
    assert (np.asarray(upright_rgb(read_image(buffer.getvalue()))) == 255).all()
