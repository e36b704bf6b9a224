"""How much memory a forward pass needs, and the best way to run it in what is free."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psutil
import torch

from handlers.serving.layout import Layout
from handlers.serving.request import Task


class Mode(Enum):
    """Ways to run a batch, from the best."""

    FULL = "full"
    """As diffusers runs it."""
    REDUCED = "reduced"
    """Full frame through `low_memory`: the same pixels but for rounding."""
    SLICED = "sliced"
    """The same, one item of the batch after the other."""
    TILED = "tiled"
    """Overlapping tiles, blended: seams may show."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that the activations of one item of a batch take at their peak."""

    full: int
    reduced: int
    tiled: int


@dataclass(frozen=True)
class MemoryUse:
    """What was measured for a model: numbers alive at the peak for each pixel of the picture or the frames."""

    full: int
    """As diffusers runs it; of encoding and decoding the one that takes more, which is decoding."""
    reduced: int
    """Through `low_memory`."""
    tile_pixels: int
    """Pixels of one tile, all its frames counted."""
    frames_at_once: int
    """Of a video, which diffusers runs in spans of so many."""

    def estimate(self, task: Task, layout: Layout, shape: Sequence[int], itemsize: int) -> Estimate:
        """Of a forward pass over inputs of this shape, in a dtype of `itemsize` bytes.

        With a quarter on top for what the measurement does not see: the workspaces of convolutions.
        """
        pixels = layout.pixels(task, shape)
        frames = layout.frames(task, shape)
        at_once = pixels * min(frames, self.frames_at_once) // frames
        assembled = pixels * 3 * 3  # the pictures of the spans and tiles, in rows, and as one
        tile = min(at_once, self.tile_pixels)
        values = (at_once * self.full, at_once * self.reduced, tile * self.reduced)
        return Estimate(*(int((value * 1.25 + assembled) * itemsize) for value in values))


def choose_modes(estimate: Estimate, batch: int, free: int, capacity: int) -> list[Mode]:
    """The modes to try, in this order: the first that fits in `free` bytes, then those that need less.

    Where none fits now, tiles are tried all the same: the estimate has a margin. None where they need more than
    `capacity`, the device's whole memory.
    """
    needs = {
        Mode.FULL: estimate.full * batch,
        Mode.REDUCED: estimate.reduced * batch,
        Mode.SLICED: estimate.reduced,
        Mode.TILED: estimate.tiled,
    }
    if needs[Mode.TILED] > capacity:
        return []
    modes = [mode for mode in Mode if needs[mode] <= free] or [Mode.TILED]
    return modes if batch > 1 else [mode for mode in modes if mode is not Mode.SLICED]


def is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class for it where torch's own allocator fails, and messages elsewhere, as the CPU has."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)


OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUDNN_STATUS_ALLOC_FAILED")
"""Of torch's CPU allocator, of the driver, of cuDNN's workspaces."""


def free_memory(device: torch.device) -> int:
    """Bytes that an allocation on this device could get now.

    Of a GPU, what torch keeps for it included; on a CPU what the heap keeps is not: a larger tensor fits into no hole.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    if (limit := _container_limit()) and (used := _read_number("memory.current", "memory/memory.usage_in_bytes")):
        free = min(free, limit - used + _file_cache())
    return free


def total_memory(device: torch.device) -> int:
    """Bytes of this device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min(psutil.virtual_memory().total, _container_limit() or sys.maxsize)


CGROUP = Path("/sys/fs/cgroup")


def _container_limit() -> int | None:
    """Bytes that the container may use, where it has a limit."""
    return _read_number("memory.max", "memory/memory.limit_in_bytes")


def _file_cache() -> int:
    """Bytes of files that count as used by the container and are given up when memory is short."""
    for name in ("memory.stat", "memory/memory.stat"):
        with suppress(OSError):
            stat = dict(line.split() for line in (CGROUP / name).read_text().splitlines())
            return int(stat.get("inactive_file", 0))
    return 0


def _read_number(*names: str) -> int | None:
    """Of the first of these files that is there: the newer and the older way of Linux's control groups."""
    for name in names:
        with suppress(OSError, ValueError):  # not there, or "max"
            return int((CGROUP / name).read_text())
    return None
