import io
import struct

import av
import numpy as np
import pytest
from PIL import Image

from handlers.serving.errors import RequestError
from handlers.serving.limits import Limits
from handlers.serving.mp4 import read_video
from handlers.serving.output import write_mp4
from handlers.serving.payload import read_image, read_json, sniff, upright_rgb

LIMITS = Limits()


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (16, 8), "red")
    image.paste("blue", (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    upright = upright_rgb(read_image(buffer.getvalue(), LIMITS))
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
def test_every_mode_becomes_rgb_on_white(image: Image.Image, expected: int) -> None:
    pixels = np.asarray(upright_rgb(image))
    assert pixels.shape == (8, 8, 3)
    assert (pixels == expected).all()


def test_transparent_palette() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", transparency=0)
    assert (np.asarray(upright_rgb(read_image(buffer.getvalue(), LIMITS))) == 255).all()


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_broken_exif_is_no_obstacle(image_format: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format=image_format, exif=b"Exif\0\0junk that is no TIFF")
    assert upright_rgb(read_image(buffer.getvalue(), LIMITS)).size == (8, 8)


def mp4(frames: int = 2, rotation: int = 0, title: bytes = b"") -> bytes:
    """A video of 64x32 whose left half is red, turned and titled by its metadata."""
    pixels = np.zeros((frames, 32, 64, 3), np.uint8)
    pixels[:, :, :32, 0] = 255
    body = write_mp4(pixels, 24)
    if rotation:  # the display matrix of the track header: 36 bytes, 16.16 and 2.30 fixed point
        place = body.index(b"tkhd") + 4 + 40
        matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
        body = body[:place] + matrix + body[place + 36 :]
    return body.replace(b"Lavf", title) if title else body


def test_video_is_turned_as_it_is_shown() -> None:
    upright = read_video(mp4(rotation=90), LIMITS)
    assert [frame.size for frame in upright] == [(32, 64), (32, 64)]
    red, black = upright[0].getpixel((16, 8)), upright[0].getpixel((16, 56))
    assert red[0] > 200 > 50 > black[0]


def test_metadata_that_is_no_utf_8_is_no_obstacle() -> None:
    assert len(read_video(mp4(title=b"Caf\xe9"), LIMITS)) == 2


def test_a_file_without_video_says_so() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(RequestError, match="the file holds no video"):
        read_video(buffer.getvalue(), LIMITS)


def test_a_still_picture_in_a_videos_clothes_is_no_video() -> None:
    with pytest.raises(RequestError, match="the body is no PNG, JPEG, WebP or MP4 file"):
        sniff(b"\0\0\0 ftypavif")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_frames=3), r"a video of 4 frames or more; at most 3, the limit here \(VAE_MAX_FRAMES\)"),
        (Limits(max_pixels=64 * 32 * 3), r"64x32 pixels in 4 frames; at most 6144 in one request.*\(VAE_MAX_PIXELS\)"),
        (Limits(max_pixels=2047), r"^64x32 pixels; at most 2047"),
    ],
)
def test_a_video_is_read_no_further_than_its_limit(limits: Limits, message: str) -> None:
    body = mp4(frames=9)
    with pytest.raises(RequestError, match=message) as refused:
        read_video(body, limits)
    assert refused.value.status == 413


def test_a_codec_that_is_not_named_is_refused() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("mjpeg", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame(64, 32, "yuvj420p")))
        container.mux(stream.encode(None))
    with pytest.raises(RequestError, match="codec is none of h264, hevc, av1, vp9, mpeg4; send") as refused:
        read_video(buffer.getvalue(), LIMITS)
    assert refused.value.status == 415


def test_a_picture_over_the_limit_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32)).save(buffer, format="PNG")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(RequestError, match="64x32 pixels; at most 2047"):
        read_image(buffer.getvalue(), Limits(max_pixels=2047))


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}])
def test_a_webp_over_the_limit_is_not_even_opened(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(buffer, format="WEBP", **options)
    assert read_image(buffer.getvalue(), Limits(max_pixels=2048)).size == (64, 32)
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(RequestError, match="64x32 pixels; at most 2047"):
        read_image(buffer.getvalue(), Limits(max_pixels=2047))


def test_a_jpeg_of_a_thousand_scans_is_not_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(buffer, format="JPEG", progressive=True)
    body = buffer.getvalue()
    assert read_image(body, LIMITS).size == (64, 32)
    scan = body.rindex(b"\xff\xda")
    with pytest.raises(RequestError, match="more than 100 scans"):
        read_image(body[:scan] + body[scan:-2] * 1000 + body[-2:], LIMITS)


def test_json_of_many_values_is_not_parsed() -> None:
    body = b'{"inputs": "", "parameters": {"x": [' + b"[]," * 10_000 + b"[]]}}"
    with pytest.raises(RequestError, match="the body is not JSON: more than 10000 values"):
        read_json(body)


def test_an_mp4_that_says_it_has_millions_of_samples_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    body = mp4()
    place = body.index(b"stsz") + 12
    monkeypatch.setattr("av.open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(RequestError, match="a track of 60000000 samples; at most 257 frames") as refused:
        read_video(body[:place] + (60_000_000).to_bytes(4) + body[place + 4 :], LIMITS)
    assert refused.value.status == 413


def test_a_rotation_that_is_no_quarter_turn_turns_nothing() -> None:
    body = mp4()
    place = body.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", 46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30)  # an eighth
    frames = read_video(body[:place] + matrix + body[place + 36 :], LIMITS)
    assert frames[0].size == (64, 32)


@pytest.mark.parametrize(
    "boxes",
    [
        b"".join(struct.pack(">I4s", 8 * (2000 - n), b"moov") for n in range(2000)),
        struct.pack(">I4s", 8, b"free") * 20_000,
    ],
)
def test_an_mp4_of_nothing_but_boxes_is_refused(boxes: bytes) -> None:
    with pytest.raises(RequestError, match=r"the video cannot be read|the MP4 file has more than 10000 boxes"):
        read_video(struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + boxes, LIMITS)
