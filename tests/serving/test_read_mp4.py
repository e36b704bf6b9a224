"""Tests of reading MP4 files: chosen frames, orientation, and limits. `test_memory_limits` has crafted files."""

import io
import struct
from collections.abc import Callable, Iterator

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from handlers.serving.errors import RequestError
from handlers.serving.limits import Limits
from handlers.serving.media import mp4
from handlers.serving.media.mp4 import read_video
from traffic import mp4_files
from traffic.mp4_files import change, make_frames, video

LIMITS = Limits()
TABLES = "moov/trak/mdia/minf/stbl"

SHARP = {"crf": "1", "preset": "veryfast"}
"""x264's options for nearly lossless frames."""


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert [child for child in psutil.Process().children() if "frames.py" in " ".join(child.cmdline())] == []


def as_array(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def shown(file: bytes) -> list[Image.Image]:
    """Return all frames that FFmpeg shows for a file, as they are stored."""
    with av.open(io.BytesIO(file)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


class TestOrientation:
    @pytest.mark.parametrize(
        ("matrix", "turned"),
        [
            ((1, 0, 0, 1), lambda frame: frame),
            ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
            ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
            ((0, -1, 1, 0), lambda frame: np.rot90(frame)),
            ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
            ((1, 0, 0, -1), lambda frame: frame[::-1]),
            ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
            ((0, -1, -1, 0), lambda frame: frame[::-1, ::-1].transpose(1, 0, 2)),
        ],
        ids=["upright", "clockwise", "half", "counterclockwise", "mirror", "flip", "transpose", "transverse"],
    )
    def test_all_eight_orientations_match_a_player(self, matrix: tuple[float, ...], turned: Callable) -> None:
        frames = make_frames(1)
        images = read_video(mp4_files.with_matrix(video(frames, **SHARP), *matrix), LIMITS)
        expected = turned(frames[0]).astype(int)
        assert as_array(images)[0].shape == expected.shape
        assert np.abs(as_array(images)[0] - expected).mean() < 6  # another orientation differs by 40 and more

    @pytest.mark.parametrize("degrees", [89.5, 90.4])
    def test_a_matrix_near_a_quarter_turn_is_a_quarter_turn(self, degrees: float) -> None:
        a, b = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        images = read_video(mp4_files.with_matrix(video(make_frames(2)), a, b, -b, a), LIMITS)
        assert [image.size for image in images] == [(32, 64), (32, 64)]

    def test_an_eighth_of_a_turn_is_ignored(self) -> None:
        file = video(make_frames(1))
        assert read_video(mp4_files.with_matrix(file, 0.7, 0.7, -0.7, 0.7), LIMITS) == read_video(file, LIMITS)

    def test_frames_equal_ffmpegs(self) -> None:
        file = video(make_frames(12, 70, 38))  # its rows have padding
        assert read_video(file, LIMITS) == shown(file)


class TestEdits:
    """Tests of a file that was cut without a new encoding: it keeps all of its frames, and a list of those to show."""

    @pytest.mark.parametrize("bframes", ["0", "3"])
    @pytest.mark.parametrize("edits", [[(500, 17)], [(250, 30), (250, 5)]])
    def test_only_the_frames_of_the_edit_list_are_read(self, bframes: str, edits: list) -> None:
        frames = make_frames(48)
        file = video(frames, bf=bframes, g="12", **SHARP)
        # The first edit of a file with B-frames skips the delay.
        delay = struct.unpack_from(">I", edit_list(file), 12)[0]
        cut = mp4_files.with_edits(file, *((duration, delay + 512 * start) for duration, start in edits))
        images = read_video(cut, LIMITS)
        numbers = [start + i for duration, start in edits for i in range(duration * 24 // 1000)]
        assert images == shown(cut)
        assert np.abs(as_array(images)[:, -8:, -8:] - frames[numbers][:, -8:, -8:]).max() < 3  # neighbors differ by 3.4

    def test_an_edit_is_allowed_in_a_long_track(self) -> None:
        cut = mp4_files.with_edits(video(make_frames(600), g="12", **SHARP), (500, 512 * 588))
        assert len(read_video(cut, LIMITS)) == 12


def edit_list(file: bytes) -> bytes:
    contents: list[bytes] = []
    change(file, "moov/trak/edts/elst", lambda content: contents.append(content) or content)
    return contents[0]


@pytest.mark.slow
class TestOtherTracks:
    @pytest.fixture
    def expected(self) -> list[Image.Image]:
        return shown(video(make_frames(9)))

    def test_five_minutes_with_pcm_sound(self, expected: list[Image.Image]) -> None:
        file = video(make_frames(9), sound=1, audio_codec="pcm_s16le")
        assert read_video(file, LIMITS) == expected
        sizes = b"stsz" + struct.pack(">III", 0, 2, 144_000)
        assert file.count(sizes) == 1
        longer = file.replace(sizes, b"stsz" + struct.pack(">III", 0, 2, 300 * 48_000))
        assert read_video(longer, LIMITS) == expected

    def test_twenty_languages(self, expected: list[Image.Image]) -> None:
        assert read_video(video(make_frames(9), sound=20), LIMITS) == expected

    def test_fragments_with_video_and_sound(self) -> None:
        file = video(make_frames(9), sound=2, flags="frag_keyframe+empty_moov+default_base_moof", g="3")
        assert file.count(b"moof") > 3
        assert read_video(file, LIMITS) == shown(video(make_frames(9), g="3"))


class TestReading:
    def test_metadata_without_utf_8_is_accepted(self) -> None:
        assert len(read_video(video(make_frames(2)).replace(b"Lavf", b"Caf\xe9"), LIMITS)) == 2

    def test_a_file_without_video_is_refused(self) -> None:
        file = video(make_frames(1), sound=1).replace(b"vide", b"text")
        with pytest.raises(RequestError, match="the file has no video"):
            read_video(file, LIMITS)

    def test_half_a_file_is_refused(self) -> None:
        with pytest.raises(RequestError, match="has no `moov` box; send the whole MP4 file"):
            read_video(video(make_frames(2)).partition(b"moov")[0], LIMITS)

    def test_a_broken_video_is_refused(self) -> None:
        file = video(make_frames(20))
        start = file.index(b"mdat") + 800  # in the frames
        with pytest.raises(RequestError, match=r"the video cannot be read \(.*; send an MP4 file"):
            read_video(file[:start] + b"\xff" * 400 + file[start + 400 :], LIMITS)

    def test_an_unlisted_codec_is_refused(self) -> None:
        buffer = io.BytesIO()
        with av.open(buffer, mode="w", format="mp4") as container:
            stream = container.add_stream("mjpeg", rate=24)
            stream.height, stream.width, stream.pix_fmt = 32, 64, "yuvj420p"
            container.mux(stream.encode(av.VideoFrame(64, 32, "yuvj420p")))
            container.mux(stream.encode(None))
        with pytest.raises(RequestError, match="codec is none of h264, hevc, av1, vp9, mpeg4; send") as refused:
            read_video(buffer.getvalue(), LIMITS)
        assert refused.value.status == 415

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            (Limits(max_frames=3), r"a video of 4 frames or more; at most 3, the limit here \(VAE_MAX_FRAMES\)"),
            (Limits(max_pixels=64 * 32 * 3), r"64x32 pixels in 4 frames; at most 6144 in one request.*_MAX_PIXELS\)"),
            (Limits(max_pixels=2047), r"^64x32 pixels; at most 2047"),
        ],
    )
    def test_a_video_is_read_no_further_than_its_limit(self, limits: Limits, message: str) -> None:
        with pytest.raises(RequestError, match=message) as refused:
            read_video(video(make_frames(9)), limits)
        assert refused.value.status == 413

    def test_each_frame_is_counted_before_it_is_kept(self) -> None:
        sizes: list[int] = []

        def reserve(size: int) -> None:
            sizes.append(size)
            if len(sizes) == 4:
                raise RequestError("no more", 413)

        with pytest.raises(RequestError, match="no more"):
            read_video(file := video(make_frames(9)), LIMITS, reserve)
        assert sizes == [len(file)] + [64 * 32 * 4] * 3

    def test_decoding_ends_at_the_deadline(self) -> None:
        with pytest.raises(RequestError, match=r"takes longer to decode than 0.01 s \(VAE_TIMEOUT\)") as refused:
            read_video(video(make_frames(9)), Limits(timeout=0.01))
        assert refused.value.status == 504

    @pytest.mark.slow
    @pytest.mark.parametrize("memory", [20_000_000, 30_000_000, 45_000_000])
    def test_decoding_ends_at_its_memory_limit(self, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mp4, "BASE_MEMORY", memory)
        monkeypatch.setattr(mp4, "MIN_FRAME_MEMORY", 0)
        monkeypatch.setattr(mp4, "PIXEL_MEMORY", 0)
        with pytest.raises(RequestError, match="the video cannot be read"):
            read_video(video(make_frames(20, 1280, 720)), LIMITS)
