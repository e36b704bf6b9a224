import io

import numpy as np
import pytest
from PIL import Image

from handlers.serving.errors import RequestError
from handlers.serving.limits import Limits
from handlers.serving.media.payload import read_image, read_json, sniff, to_rgb

LIMITS = Limits()


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (16, 8), "red")
    image.paste("blue", (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # must be rotated a quarter clockwise
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    upright = to_rgb(read_image(buffer.getvalue(), LIMITS))
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
        (Image.new("I;16", (8, 8), 128 * 257), 128),
        (Image.new("I;16", (8, 8), 100), 0),
        (Image.new("I", (8, 8), 128 * 257), 128),
        (Image.new("1", (8, 8), 1), 255),
    ],
)
def test_every_image_mode_becomes_rgb_on_white(image: Image.Image, expected: int) -> None:
    pixels = np.asarray(to_rgb(image))
    assert pixels.shape == (8, 8, 3)
    assert (pixels == expected).all()


def test_transparent_palette() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", transparency=0)
    assert (np.asarray(to_rgb(read_image(buffer.getvalue(), LIMITS))) == 255).all()


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_broken_exif_is_ignored(image_format: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format=image_format, exif=b"Exif\0\0junk that is no TIFF")
    assert to_rgb(read_image(buffer.getvalue(), LIMITS)).size == (8, 8)


def test_a_still_image_in_a_video_container_is_refused() -> None:
    with pytest.raises(RequestError, match="the body is no PNG, JPEG, WebP or MP4 file"):
        sniff(b"\0\0\0 ftypavif")


def test_an_image_over_the_limit_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32)).save(buffer, format="PNG")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(RequestError, match="64x32 pixels; at most 2047"):
        read_image(buffer.getvalue(), Limits(max_pixels=2047))


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}])
def test_a_webp_over_the_limit_is_not_opened(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(buffer, format="WEBP", **options)
    assert read_image(buffer.getvalue(), Limits(max_pixels=2048)).size == (64, 32)
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(RequestError, match="64x32 pixels; at most 2047"):
        read_image(buffer.getvalue(), Limits(max_pixels=2047))


def test_a_jpeg_with_a_thousand_scans_is_not_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(buffer, format="JPEG", progressive=True)
    body = buffer.getvalue()
    assert read_image(body, LIMITS).size == (64, 32)
    scan = body.rindex(b"\xff\xda")
    with pytest.raises(RequestError, match="more than 100 scans"):
        read_image(body[:scan] + body[scan:-2] * 1000 + body[-2:], LIMITS)


def test_json_with_many_values_is_not_parsed() -> None:
    body = b'{"inputs": "", "parameters": {"x": [' + b"[]," * 10_000 + b"[]]}}"
    with pytest.raises(RequestError, match="the body is not JSON: more than 10000 values"):
        read_json(body)
