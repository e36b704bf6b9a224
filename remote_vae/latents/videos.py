"""Frames of videos: which ones the trainers train on, and how they read them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import Image

from remote_vae.latents.buckets import Placement
from remote_vae.latents.format import ImageFile, Pixels

FRAME_FACTOR = 4
"""Frames per latent frame, after the first, of every VAE for which musubi-tuner and ai-toolkit cache videos."""

SUFFIXES = frozenset({".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg"})
"""Suffixes of the videos that musubi-tuner loads, in lower case."""

Clip = tuple[int, int]
"""First frame and number of frames."""


@dataclass(frozen=True)
class Sampling:
    """Clips of a video, as the options of musubi-tuner's dataset config choose them.

    Raises:
        ValueError: an option has a value that musubi-tuner does not take.
    """

    frames: tuple[int, ...]
    """`target_frames`: lengths of clips."""
    extraction: str = "head"
    """`frame_extraction`."""
    stride: int = 1
    """`frame_stride` of "slide"."""
    samples: int = 1
    """`frame_sample` of "uniform"."""
    max_frames: int = 129
    """`max_frames` of "full"."""
    source_fps: float | None = None
    """Frames per second of all videos. None: use every frame, without a conversion to the model's rate."""

    def __post_init__(self) -> None:
        kinds = ("head", "chunk", "slide", "uniform", "full")
        if self.extraction not in kinds:
            raise ValueError(f"--frame-extraction {self.extraction}: expected one of {', '.join(kinds)}")
        if min(*self.frames, self.stride, self.samples, self.max_frames, self.source_fps or 1, 1) <= 0:
            raise ValueError("the options of frames must be above 0")

    @property
    def lengths(self) -> list[int]:
        """Return the lengths of clips, each rounded down to 1, 5, 9, ..."""
        return sorted({_rounded(frames) for frames in self.frames})

    @property
    def end(self) -> int | None:
        """Frame at which reading may stop."""
        return max(self.lengths) if self._kind == "head" else None

    @property
    def _kind(self) -> str:
        return "head" if self.extraction == "uniform" and self.samples == 1 else self.extraction

    def clips(self, count: int) -> list[Clip]:
        """Return the clips of a video of so many frames."""
        if self._kind == "full":
            frames = _rounded(min(count, self.max_frames))
            return [(0, frames)] if frames > 0 else []
        clips: list[Clip] = []
        for frames in self.lengths:
            last = count - frames
            starts: Iterable[int] = {
                "head": [0],
                "chunk": range(0, last + 1, frames),
                "slide": range(0, last + 1, self.stride),
                "uniform": map(int, np.linspace(0, max(last, 0), self.samples, dtype=int)),
            }[self._kind]
            clips += [(start, frames) for start in starts if last >= 0]
        return list(dict.fromkeys(clips))


def _rounded(frames: int) -> int:
    return (frames - 1) // FRAME_FACTOR * FRAME_FACTOR + 1


@contextmanager
def opened(file: BinaryIO) -> Iterator[Any]:
    """Open a video with PyAV.

    Raises:
        ValueError: it has no video.
    """
    import av

    with av.open(file) as container:
        if not container.streams.video:
            raise ValueError("the file has no video")
        yield container


def read_size(file: BinaryIO) -> tuple[int, int]:
    """Return width and height of the first frame."""
    with opened(file) as container:
        frame = next(container.decode(video=0), None)
        if frame is None:
            raise ValueError("the video has no frame")
        return frame.width, frame.height


def read_frames(container: Any, sampling: Sampling, target_fps: float) -> Iterator[Any]:
    """Yield the frames that musubi-tuner keeps. It drops frames to reach the model's frame rate."""
    delta = target_fps / sampling.source_fps if sampling.source_fps else 1.0
    position, previous = 0.0, -1
    for frame in container.decode(video=0):
        index = int(position)
        position += delta
        if index == previous:
            continue
        previous = index
        if sampling.end is not None and index >= sampling.end:
            return
        yield frame


def read_clips(
    frames: Iterator[Any], clips: list[Clip], fit: Callable[[Image.Image], Pixels]
) -> Iterator[tuple[Clip, np.ndarray[Any, Any]]]:
    """Yield each clip with its pixels [F, H, W, 3] in 8 bits. Hold only the frames of clips that are not complete."""
    waiting = sorted(clips, key=lambda clip: (sum(clip), clip))
    held: dict[int, np.ndarray[Any, Any]] = {}
    for index, frame in enumerate(frames):
        if not waiting:
            return
        first = min(start for start, _ in waiting)
        for old in [each for each in held if each < first]:
            del held[old]
        if index >= first:
            held[index] = np.array(fit(frame.to_image()))
        while waiting and sum(waiting[0]) == index + 1:
            start, count = clip = waiting.pop(0)
            yield clip, np.stack([held[each] for each in range(start, start + count)])


def missing_clips(
    image: ImageFile,
    sampling: Sampling,
    rate: float,
    is_stored: Callable[[ImageFile], bool],
    fit: Callable[[Image.Image, Placement], Pixels],
) -> Iterator[tuple[ImageFile, np.ndarray[Any, Any]]]:
    """Yield the clips of a video that are not stored yet, with their pixels [F, H, W, 3] in 8 bits.

    Raises:
        ValueError: the video is too short for every clip.
    """
    with image.files.open(image.relative) as file, opened(file) as container:
        count = sum(1 for _ in read_frames(container, sampling, rate))
    parts = {clip: replace(image, clip=clip) for clip in sampling.clips(count)}
    if not parts:
        raise ValueError(f"the video has {count} frames, too few for clips of {min(sampling.lengths)}")
    missing = [clip for clip, part in parts.items() if not is_stored(part)]
    with image.files.open(image.relative) as file, opened(file) as container:
        frames = read_frames(container, sampling, rate)
        for clip, pixels in read_clips(frames, missing, lambda frame: fit(frame, image.placement)):
            yield parts[clip], pixels


@contextmanager
def captured(file: BinaryIO) -> Iterator[cv2.VideoCapture]:
    """Open a video with OpenCV, as ai-toolkit does. OpenCV needs a path, so others than local files are copied.

    Raises:
        ValueError: OpenCV cannot read it.
    """
    with tempfile.NamedTemporaryFile() as copy:
        path = getattr(file, "name", None)
        if not isinstance(path, str) or not Path(path).is_file():
            shutil.copyfileobj(file, copy)
            copy.flush()
            path = copy.name
        video = cv2.VideoCapture(path)
        try:
            if not video.isOpened():
                raise ValueError("OpenCV cannot open the video; save it with another codec, such as H.264")
            yield video
        finally:
            video.release()


def frame_size(video: cv2.VideoCapture) -> tuple[int, int]:
    """Return width and height of the frames."""
    return int(video.get(cv2.CAP_PROP_FRAME_WIDTH)), int(video.get(cv2.CAP_PROP_FRAME_HEIGHT))


def read_first(video: cv2.VideoCapture, frames: int, fit: Callable[[Image.Image], Pixels]) -> np.ndarray[Any, Any]:
    """Return the first frames of a video [F, H, W, 3] in 8 bits.

    Raises:
        ValueError: the video has fewer.
    """
    fitted: list[np.ndarray[Any, Any]] = []
    while len(fitted) < frames:
        is_read, frame = video.read()
        if not is_read:
            raise ValueError(f"the video has {len(fitted)} frames that can be read: expected {frames} or more")
        fitted.append(np.array(fit(Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))))
    return np.stack(fitted)


def spread(count: int, frames: int) -> list[int]:
    """Return the frames that ai-toolkit takes of a video of `count` frames: evenly, from the first to the last."""
    interval = (count - 1) / (frames - 1) if frames > 1 else 0
    return [min(round(index * interval), count - 1) for index in range(frames)]


def read_spread(video: cv2.VideoCapture, frames: int, fit: Callable[[Image.Image], Pixels]) -> np.ndarray[Any, Any]:
    """Return so many frames of a video [F, H, W, 3] in 8 bits, evenly from the first to the last.

    Raises:
        ValueError: a frame cannot be read. ai-toolkit itself would take a frame nearby.
    """
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    if count < 1:
        raise ValueError("the video has no frame that OpenCV can count; save it again")
    indices = spread(count, frames)
    fitted: dict[int, np.ndarray[Any, Any]] = {}
    for index in range(indices[-1] + 1):
        is_read = video.grab()
        if is_read and index in indices:
            is_read, frame = video.retrieve()
            fitted[index] = np.array(fit(Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))))
        if not is_read:
            raise ValueError(f"frame {index} of {indices[-1] + 1} cannot be read; save the video again")
    return np.stack([fitted[index] for index in indices])
