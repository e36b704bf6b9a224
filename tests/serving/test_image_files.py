"""Tests of PNG, JPEG and WebP files by cameras, editors and hostile clients, and of the pixels that a VAE gets."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from PIL import Image, ImageOps

from handlers.serving.errors import RequestError
from handlers.serving.layout import Layout
from handlers.serving.limits import Limits
from handlers.serving.media.image_files import PNG, inspect
from handlers.serving.media.payload import read_image, to_rgb
from handlers.serving.media.pixels import from_images, shape_of_images

LIMITS = Limits()


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def rgb(body: bytes) -> np.ndarray:
    return np.asarray(to_rgb(read_image(body, LIMITS)))


def decoded_by_pillow(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], depth: int, color_type: int, rows: Sequence[bytes], *chunks: bytes) -> bytes:
    """Return a PNG with these rows as bytes and with chunks before its image data."""
    header = struct.pack(">IIBBBBB", *size, depth, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    before = chunk(b"IHDR", header) + b"".join(chunks)
    return b"\x89PNG\r\n\x1a\n" + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def with_chunks(body: bytes, *chunks: bytes) -> bytes:
    """Insert chunks after the header of a PNG."""
    return body[:33] + b"".join(chunks) + body[33:]


def with_segments(body: bytes, segments: bytes) -> bytes:
    """Insert segments after the first segment of a JPEG."""
    return body[:20] + segments + body[20:]


class TestTransparency:
    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            (png((3, 1), 16, 0, [struct.pack(">3H", 999, 1000, 1001)], chunk(b"tRNS", b"\x03\xe8")), [4, 255, 4]),
            (png((3, 1), 2, 0, [b"\x18"], chunk(b"tRNS", b"\0\1")), [0, 255, 170]),
            (png((2, 1), 4, 0, [b"\x12"], chunk(b"tRNS", b"\0\2")), [17, 255]),
            (png((2, 1), 8, 0, [b"\1\2"], chunk(b"tRNS", b"\0\2")), [1, 255]),
            (png((2, 1), 1, 0, [b"\x40"], chunk(b"tRNS", b"\0\0")), [255, 255]),
            (png((2, 1), 1, 0, [b"\x40"], chunk(b"tRNS", b"\0\1")), [0, 255]),
            (png((2, 1), 16, 2, [b"\1\2" * 3 + b"\1\3" * 3], chunk(b"tRNS", b"\1\2" * 3)), [255, 1]),
            (png((2, 1), 16, 2, [b"\1\2" * 6], chunk(b"tRNS", b"\1\2" * 2 + b"\1\3")), [1, 1]),
            (png((2, 1), 8, 2, [b"\1\1\1\2\2\2"], chunk(b"tRNS", b"\0\1" * 3)), [255, 2]),
            (png((2, 1), 16, 4, [struct.pack(">4H", 256, 65535, 256, 0)]), [1, 255]),
            (png((2, 1), 16, 6, [struct.pack(">8H", *[256] * 3, 65535, *[256] * 3, 0)]), [1, 255]),
            (png((2, 1), 2, 3, [b"\x10"], chunk(b"PLTE", b"\7\7\7\x09\x09\x09"), chunk(b"tRNS", b"\xff\0")), [7, 255]),
        ],
    )
    def test_transparent_pixels_are_white_at_every_depth(self, body: bytes, expected: list[int]) -> None:
        assert rgb(body)[0, :, 0].tolist() == expected


class TestMetadata:
    """Tests of text, profiles and previews: they do not change pixels, and every such file is readable."""

    @pytest.mark.parametrize(
        "big",
        [
            chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"text " * 500_000)),
            chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"text " * 500_000)),
            chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2_000_000))),
            chunk(b"zTXt", b"A\0\0" + zlib.compress(b"text " * 100_000)) * 200,
        ],
    )
    def test_a_png_with_much_text_or_a_large_profile(self, photo: Image.Image, big: bytes) -> None:
        assert (rgb(with_chunks(saved(photo, "PNG"), big)) == np.asarray(photo)).all()

    def test_a_jpeg_with_a_profile_text_and_a_preview(self, photo: Image.Image) -> None:
        body = saved(photo, "JPEG", quality=95)
        preview = b"\xff\xe1" + struct.pack(">H", 2 + len(body)) + body
        profile = b"\xff\xe2\xff\xff" + b"ICC_PROFILE\0\1\1".ljust(65533, b"\xff")
        many = with_segments(body, preview + profile * 50 + b"\xff\xfe\0\4hi" * 100)
        assert (rgb(many) == decoded_by_pillow(body)).all()

    @pytest.mark.parametrize("after", [b"\xff\xda" * 1000, b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\3\1" * 5000])
    def test_a_motion_photo(self, photo: Image.Image, after: bytes) -> None:
        body = saved(photo, "JPEG", progressive=True)
        assert (rgb(body + after) == decoded_by_pillow(body)).all()

    @pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
    @pytest.mark.parametrize("metadata", ["exif", "xmp"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_orientation(self, photo: Image.Image, image_format: str, metadata: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        xmp = f'<x:xmpmeta tiff:Orientation="{orientation}"/>'.encode()
        options = {"exif": exif} if metadata == "exif" else {"xmp": xmp}
        if image_format == "PNG" and metadata == "xmp":
            text = b"XML:com.adobe.xmp\0\1\0en\0\0" + zlib.compress(xmp)
            body = with_chunks(saved(photo, "PNG"), chunk(b"iTXt", text))
        else:
            body = saved(photo, image_format, **options)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(body))).convert("RGB")
        assert (rgb(body) == np.asarray(expected)).all()

    @pytest.mark.parametrize("kind", [1, 3, 4])
    def test_orientation_applies_for_the_types_that_pillow_reads(self, photo: Image.Image, kind: int) -> None:
        exif = b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, kind, 1, 6) + bytes(4)
        body = with_chunks(saved(photo, "PNG"), chunk(b"eXIf", exif))
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(body)))
        assert expected.size == (photo.size if kind == 1 else photo.size[::-1])
        assert (rgb(body) == np.asarray(expected)).all()

    @pytest.mark.parametrize(("metadata", "flag"), [("exif", 0b1000), ("xmp", 0b100)])
    def test_metadata_that_a_webp_does_not_announce_is_ignored(
        self, photo: Image.Image, metadata: str, flag: int
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        body = saved(
            photo, "WEBP", lossless=True, **{metadata: exif if metadata == "exif" else b'<x tiff:Orientation="6"/>'}
        )
        assert rgb(body).shape == (40, 24, 3)
        unannounced = body[:20] + bytes([body[20] & ~flag]) + body[21:]
        assert (rgb(unannounced) == np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(unannounced))))).all()
        assert rgb(unannounced).shape == (24, 40, 3)

    @pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
    def test_recursive_exif_takes_no_memory(self, photo: Image.Image, image_format: str) -> None:
        entries = b"".join(struct.pack("<HHII", tag, 7, 60_000, 8) for tag in range(5000))
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5000) + entries
        body = saved(photo, image_format, exif=exif)
        tracemalloc.start()
        read_image(body, LIMITS)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 5_000_000  # each entry has 60 kB

    @pytest.mark.parametrize("options", [{}, {"lossless": True}, {"save_all": True}])
    def test_an_animated_webp_is_its_first_image(self, photo: Image.Image, options: dict) -> None:
        more = [Image.new("RGB", photo.size, "red")]
        body = saved(photo, "WEBP", **options, append_images=more, icc_profile=b"x" * 100_000)
        assert (rgb(body) == decoded_by_pillow(body)).all()

    def test_an_animated_png_is_its_first_image(self, photo: Image.Image) -> None:
        body = saved(photo, "PNG", save_all=True, append_images=[Image.new("RGB", photo.size, "red")])
        assert (rgb(body) == np.asarray(photo)).all()


class TestOrder:
    def test_a_png_that_does_not_begin_with_its_header_is_refused(self) -> None:
        """Test that the file is refused.

        Pillow ignores a transparent color before the header, and other readers refuse the file.
        """
        file = png((2, 1), 8, 0, [b"\1\2"])
        early = PNG + chunk(b"tRNS", b"\0\2") + file[len(PNG) :]
        with pytest.raises(RequestError, match="the image cannot be read"):
            inspect(early)

    @pytest.mark.parametrize("end", [b"", chunk(b"PLTE", b"\7\7\7\x09\x09\x09")])
    def test_pixels_before_their_palette_are_refused(self, end: bytes) -> None:
        file = png((2, 1), 1, 3, [b"\x40"]).replace(chunk(b"IEND", b""), end + chunk(b"IEND", b""))
        with pytest.raises(RequestError, match="its palette is missing, or comes after its pixels"):
            read_image(file, LIMITS)


class TestLoops:
    """Tests of data that Pillow reads byte by byte, or chunk by chunk, in Python: a second a megabyte."""

    @pytest.mark.parametrize("noise", [b"\xff", b"\0", b"ab"])
    def test_bytes_between_the_segments_of_a_jpeg_are_skipped(self, photo: Image.Image, noise: bytes) -> None:
        body = saved(photo, "JPEG")
        start = time.thread_time()
        assert (rgb(with_segments(body, noise * (20_000_000 // len(noise)))) == decoded_by_pillow(body)).all()
        assert time.thread_time() - start < 10

    @pytest.mark.parametrize(
        ("image_format", "segment", "message"),
        [
            ("JPEG", b"\xff\xe5\0\2", "the JPEG file has more than 2000 segments"),
            ("JPEG", b"\xff\xfe\0\2", "the JPEG file has more than 2000 segments"),
            ("JPEG", b"\xff\xdb\xff\xd2" + (b"\0" + bytes(64)) * 1008, "bytes of tables"),
            ("PNG", chunk(b"vaEx", b""), r"the PNG file has more than \d+ chunks"),
            ("PNG", chunk(b"IDAT", b""), r"the PNG file has more than \d+ chunks"),
            ("WEBP", b"vaEx\0\0\0\0", r"the WebP file has more than \d+ chunks"),
        ],
    )
    def test_a_file_of_many_tiny_segments_is_refused(
        self, photo: Image.Image, image_format: str, segment: bytes, message: str
    ) -> None:
        segments = segment * (10_000_000 // len(segment))
        body = saved(photo, image_format)
        if image_format == "WEBP":
            body = body[:30] + segments
            body = body[:16] + struct.pack("<I", 10) + body[20:]
        else:
            body = with_chunks(body, segments) if image_format == "PNG" else with_segments(body, segments)
        start = time.thread_time()
        with pytest.raises(RequestError, match=message) as refused:
            read_image(body, LIMITS)
        assert refused.value.status == 422
        assert time.thread_time() - start < 10

    def test_image_data_in_small_chunks_is_read(self, photo: Image.Image) -> None:
        body = saved(photo, "PNG")
        begin = body.index(b"IDAT") - 4
        length = int.from_bytes(body[begin : begin + 4])
        data = body[begin + 8 : begin + 8 + length]
        segments = b"".join(chunk(b"IDAT", data[offset : offset + 1]) for offset in range(length))
        assert (rgb(body[:begin] + segments + body[begin + 12 + length :]) == np.asarray(photo)).all()

    @pytest.mark.slow
    def test_a_jpeg_with_empty_scans_is_refused_by_its_pixels(self) -> None:
        body = saved(Image.new("RGB", (8000, 8000)), "JPEG", progressive=True)
        scan = body.rindex(b"\xff\xda")
        with pytest.raises(RequestError, match="more than 23 scans"):
            read_image(body[:scan] + body[scan:-2] * 50 + body[-2:], LIMITS)


class TestFloats:
    """Tests that the VAE's input equals diffusers' in each bit and stride. Strides affect the rounding of kernels."""

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [(40, 24), (41, 29), (1500, 1200)])
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
    def test_a_batch(self, size: tuple[int, int], mode: str) -> None:
        pixels = np.random.default_rng(1).integers(0, 256, (2, size[1], size[0], 3), dtype=np.uint8)
        images = [Image.fromarray(array).convert(mode) for array in pixels]
        expected = VaeImageProcessor(vae_scale_factor=8).preprocess([to_rgb(image) for image in images])
        shape = shape_of_images([size] * 2, Layout("image", 4, 8))
        tensor = from_images(iter(images), shape)
        assert tensor.stride() == expected.stride()
        assert torch.equal(tensor, expected)

    @pytest.mark.parametrize("count", [1, 3, 7])
    def test_a_video(self, count: int) -> None:
        layout = Layout("video", 16, 8, (1, 5, 9), 5)
        pixels = np.random.default_rng(2).integers(0, 256, (count, 40, 52, 3), dtype=np.uint8)
        frames = [Image.fromarray(array) for array in pixels]
        shape = shape_of_images([frame.size for frame in frames], layout)
        expected = VideoProcessor(vae_scale_factor=8).preprocess_video(frames[: shape[2]])
        tensor = from_images(iter(frames), shape)
        assert (tuple(tensor.shape), tensor.stride()) == (shape, expected.stride())
        assert torch.equal(tensor, expected)
