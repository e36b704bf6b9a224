"""What a request may cost, in one place: each limit, its default, and the check that enforces it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from handlers.serving.errors import RequestError


class Limits(BaseModel):
    """`VAE_<NAME>` in the environment sets each of these."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    max_body_mb: Annotated[float, Field(gt=0)] = 512
    """Megabytes of a request's body; a minute of 720p video as uint8 pixels is about this much."""
    max_in_flight_mb: Annotated[float, Field(gt=0)] = 2048
    """Megabytes of the bodies of all requests that are in the service at a time, and of what was made of them.

    Unless it is set, no more than an eighth of the machine's memory.
    """
    max_pixels: Annotated[int, Field(ge=1)] = 128_000_000
    """Pixels of a request, all pictures of a batch and all frames counted: 139 frames of 1280x720, or 11313x11313."""
    max_frames: Annotated[int, Field(ge=1)] = 257
    """Frames of a video; ten seconds at 24 frames a second are 241."""
    max_batch: Annotated[int, Field(ge=1)] = 64
    """Pictures or videos in one request."""
    max_queue: Annotated[int, Field(ge=1)] = 64
    """Requests in the service whose body is there, beside those on a device. One more waits for `queue_timeout`."""
    queue_timeout: Annotated[float, Field(ge=0)] = 5
    """Seconds that a request waits for one of these slots before it is told to come back (503).

    The released clients do not come back. And those that do, at once or all after a second, would keep the service busy
    refusing them, or leave the device idle.
    """
    timeout: Annotated[float, Field(gt=0)] = 300
    """Seconds from the first byte of a request until its answer is ready."""
    grace: Annotated[float, Field(ge=0)] = 20
    """Seconds after SIGTERM in which requests that are in are still finished; Kubernetes kills after 30."""

    def within(self, memory: int) -> Self:
        """These limits on a machine, or in a container, of so many bytes."""
        if "max_in_flight_mb" in self.model_fields_set:
            return self
        return self.model_copy(update={"max_in_flight_mb": min(self.max_in_flight_mb, memory // 8_000_000)})

    def check_body(self, size: int) -> None:
        """Bytes of a body, counted as they come."""
        if size > self.max_body_mb * 1e6:
            raise _too_large(f"the body is larger than {self.max_body_mb:g} MB", "VAE_MAX_BODY_MB")

    def check_in_flight(self, size: int, own: int) -> None:
        """Bytes of all requests together, and of one of them, which may be too much by itself."""
        if own > self.max_in_flight_mb * 1e6:
            raise _too_large(
                f"the request takes {own / 1e6:.0f} MB; at most {self.max_in_flight_mb:g}", "VAE_MAX_IN_FLIGHT_MB"
            )
        if size > self.max_in_flight_mb * 1e6:
            raise RequestError(
                f"requests hold {self.max_in_flight_mb:g} MB already (VAE_MAX_IN_FLIGHT_MB); try again soon", 503
            )

    def check_image(self, width: int, height: int, frames: int = 1, batch: int = 1) -> None:
        """A batch of such pictures, or the first so many frames of a video, before their pixels are decoded."""
        self._check_frames(frames)
        what = f"{width}x{height} pixels" + _of_frames(frames) + (f" in each of {batch} pictures" if batch > 1 else "")
        self._check_pixels(width * height * frames * batch, what)

    def check_files(self, batch: int) -> None:
        """Pictures in one request, before any is read."""
        if batch > self.max_batch:
            raise _too_large(f"a batch of {batch} pictures; at most {self.max_batch}", "VAE_MAX_BATCH")

    def check_batch(self, shape: Sequence[int], frames: int, pixels: int) -> None:
        """A batch of tensors of this shape, before anything is made of it; frames and pixels of each of its items."""
        if shape[0] > self.max_batch:
            raise _too_large(f"`shape`: a batch of {shape[0]}; at most {self.max_batch}", "VAE_MAX_BATCH")
        self._check_frames(frames)
        self._check_pixels(shape[0] * pixels, f"`shape` {list(shape)} is {shape[0] * pixels} pixels")

    def _check_frames(self, frames: int) -> None:
        if frames > self.max_frames:
            raise _too_large(f"a video of {frames} frames or more; at most {self.max_frames}", "VAE_MAX_FRAMES")

    def _check_pixels(self, pixels: int, what: str) -> None:
        if pixels > self.max_pixels:
            raise _too_large(f"{what}; at most {self.max_pixels} in one request", "VAE_MAX_PIXELS")


def _of_frames(frames: int) -> str:
    return f" in {frames} frames" if frames > 1 else ""


def _too_large(message: str, variable: str) -> RequestError:
    return RequestError(f"{message}, the limit here ({variable})", 413)
