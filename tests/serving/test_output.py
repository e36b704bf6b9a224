"""Tests of an MP4 whose encoder runs beside the decoder."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import suppress

import av
import numpy as np
import pytest

from handlers.serving.errors import RequestError
from handlers.serving.media import output
from handlers.serving.media.output import Mp4Writer, write_mp4
from tests.support.endpoint import same_video

CHUNKED_DECODERS = (13, 12, 8)


@pytest.fixture
def frames() -> np.ndarray:
    """Return noise, uint8 [33, 32, 48, 3]."""
    return np.random.default_rng(0).integers(0, 256, (sum(CHUNKED_DECODERS), 32, 48, 3), np.uint8)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    for thread in encoder_threads():
        thread.join(10)
    assert not encoder_threads()


def encoder_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mp4"]


def add_chunks(writer: Mp4Writer, frames: np.ndarray) -> None:
    for chunk in np.split(frames, np.cumsum(CHUNKED_DECODERS)[:-1]):
        writer.add(chunk)


def test_the_file_equals_an_encoding_of_all_frames_at_once(frames: np.ndarray) -> None:
    with Mp4Writer(12.5) as writer:
        add_chunks(writer, frames)
    assert same_video(writer.finish(), write_mp4(frames, 12.5))
    with av.open(io.BytesIO(writer.finish())) as container:
        assert container.streams.video[0].average_rate == 12.5
        assert len(list(container.decode(video=0))) == len(frames)


def test_an_unread_file_is_written_to_its_end(frames: np.ndarray) -> None:
    with Mp4Writer(24) as writer:
        add_chunks(writer, frames)
    # `no_thread_is_left`


def test_a_file_is_dropped_if_decoding_fails(frames: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding, go_on, encoded = threading.Event(), threading.Event(), []

    def slow_write(frames: Iterator[np.ndarray], fps: float) -> bytes:
        for frame in frames:
            encoded.append(frame)
            encoding.set()
            go_on.wait(10)
        return b""

    monkeypatch.setattr(output, "write_mp4", slow_write)
    with suppress(ZeroDivisionError), Mp4Writer(24) as writer:
        add_chunks(writer, frames)
        assert encoding.wait(10)
        raise ZeroDivisionError
    go_on.set()
    for thread in encoder_threads():
        thread.join(10)
    assert len(encoded) == 1


@pytest.mark.parametrize("when", ["before the first frames", "while waiting"])
def test_a_file_without_frames_is_dropped(when: str, frames: np.ndarray) -> None:
    with suppress(ZeroDivisionError), Mp4Writer(24) as writer:
        if when == "while waiting":
            writer.add(frames)
        raise ZeroDivisionError


def test_finish_raises_an_error_of_the_encoder(frames: np.ndarray) -> None:
    with Mp4Writer(24) as writer:
        writer.add(frames[:, :31])
    with pytest.raises(RequestError, match="the MP4 encoder failed; the log has the reason") as error:
        writer.finish()
    assert error.value.status == 500


def test_an_error_of_the_encoder_ends_the_decoding(frames: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    with Mp4Writer(24) as writer:
        writer.add(frames[:, :31])
        for thread in encoder_threads():
            thread.join(10)
        with pytest.raises(RequestError, match="the MP4 encoder failed"):
            writer.add(frames[:, :31])
    assert "avcodec_open2" in caplog.text


def test_adding_frames_does_not_wait_for_the_encoder(frames: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    all_added = threading.Event()

    def stuck(frames: Iterator[np.ndarray], fps: float) -> bytes:
        next(frames)
        assert all_added.wait(10)
        return b"%d more at %g" % (len(list(frames)), fps)

    monkeypatch.setattr(output, "write_mp4", stuck)
    with Mp4Writer(24) as writer:
        add_chunks(writer, frames)
        all_added.set()
    assert writer.finish() == b"32 more at 24"
