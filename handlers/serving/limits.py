"""Limits of a request: their defaults and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from handlers.serving.errors import RequestError


class Limits(BaseModel):
    """Limits of a request. `VAE_<NAME>` in the environment sets each of them."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    max_body_mb: Annotated[float, Field(gt=0)] = 512
    """Megabytes of a request's body; 512 MB are 185 frames of 1280x720 as uint8 pixels."""
    max_in_flight_mb: Annotated[float, Field(gt=0)] = 2048
    """Megabytes in flight: the bodies of all requests, and the tensors made from them.

    The default is at most an eighth of the machine's memory.
    """
    max_pixels: Annotated[int, Field(ge=1)] = 128_000_000
    """Pixels of a request, in all images and frames: 138 frames of 1280x720, or 11313x11313."""
    max_frames: Annotated[int, Field(ge=1)] = 257
    """Frames of a video; ten seconds at 24 frames per second are 241."""
    max_batch: Annotated[int, Field(ge=1)] = 64
    """Images or videos of a request."""
    max_queue: Annotated[int, Field(ge=1)] = 64
    """Slots, one more for each device. A request has one from its complete body to the end of its response."""
    queue_timeout: Annotated[float, Field(ge=0)] = 5
    """Seconds that a request waits for a slot before it is refused (503).

    diffusers' `remote_decode` does not retry, and many retries at once would keep the service busy.
    """
    timeout: Annotated[float, Field(gt=0)] = 300
    """Seconds from the first byte of a request until its response is ready."""
    grace: Annotated[float, Field(ge=0)] = 20
    """Seconds after SIGTERM and `drain_delay` in which running requests may finish. Kubernetes kills after 30."""
    drain_delay: Annotated[float, Field(ge=0)] = 0
    """Seconds after SIGTERM in which `/health` is 503 and requests are still taken.

    Load balancers stop sending requests meanwhile.
    """

    def within(self, memory: int) -> Self:
        """Return the limits for a machine or container with `memory` bytes."""
        if "max_in_flight_mb" in self.model_fields_set:
            return self
        return self.model_copy(update={"max_in_flight_mb": min(self.max_in_flight_mb, memory // 8_000_000)})

    def check_body(self, size: int) -> None:
        """Check the bytes of a body, while they arrive."""
        if size > self.max_body_mb * 1e6:
            raise _too_large(f"the body is larger than {self.max_body_mb:g} MB", "VAE_MAX_BODY_MB")

    def check_in_flight(self, size: int, own: int) -> None:
        """Check the bytes of all requests together, and of one request alone."""
        if own > self.max_in_flight_mb * 1e6:
            raise _too_large(
                f"the request takes {own / 1e6:.0f} MB; at most {self.max_in_flight_mb:g}", "VAE_MAX_IN_FLIGHT_MB"
            )
        if size > self.max_in_flight_mb * 1e6:
            raise RequestError(
                f"with this request more than {self.max_in_flight_mb:g} MB would be in flight (VAE_MAX_IN_FLIGHT_MB); "
                "try again soon",
                503,
            )

    def check_image(self, width: int, height: int, frames: int = 1, batch: int = 1) -> None:
        """Check a batch of images, or the first frames of a video, before their pixels are decoded."""
        self._check_frames(frames)
        counts = (f" in {frames} frames" if frames > 1 else "") + (f" in each of {batch} images" if batch > 1 else "")
        self._check_pixels(width * height * frames * batch, f"{width}x{height} pixels{counts}")

    def check_files(self, batch: int) -> None:
        """Check the number of images of a request, before any is read."""
        if batch > self.max_batch:
            raise _too_large(f"a batch of {batch} images; at most {self.max_batch}", "VAE_MAX_BATCH")

    def check_batch(self, shape: Sequence[int], frames: int, pixels: int) -> None:
        """Check the shape of a batch, and the frames and pixels of each of its items."""
        if shape[0] > self.max_batch:
            raise _too_large(f"`shape`: a batch of {shape[0]}; at most {self.max_batch}", "VAE_MAX_BATCH")
        self._check_frames(frames)
        self._check_pixels(shape[0] * pixels, f"`shape` {list(shape)} is {shape[0] * pixels} pixels")

    def _check_frames(self, frames: int) -> None:
        if frames > self.max_frames:
            raise _too_large(f"a video of {frames} frames or more; at most {self.max_frames}", "VAE_MAX_FRAMES")

    def _check_pixels(self, pixels: int, description: str) -> None:
        if pixels > self.max_pixels:
            raise _too_large(f"{description}; at most {self.max_pixels} in one request", "VAE_MAX_PIXELS")


def _too_large(message: str, variable: str) -> RequestError:
    return RequestError(f"{message}, the limit here ({variable})", 413)
