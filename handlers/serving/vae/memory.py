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

from handlers.model import Model, Task
from handlers.serving.layout import Layout


class Mode(Enum):
    """Ways to run a batch, from the best."""

    FAST = "fast"
    """Full frame through `fast`: the same pixels but for rounding."""
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
    """Bytes that one item of a batch takes at the peak."""

    full: int
    """Of activations as diffusers runs it; the fast pass takes less."""
    reduced: int
    tiled: int
    result: int
    """Of what is there besides: the result, and the parts that it is put together from."""

    def of(self, mode: Mode, batch: int) -> int:
        """Bytes that so many items take in this mode."""
        activations = {
            Mode.FAST: self.full * batch,
            Mode.FULL: self.full * batch,
            Mode.REDUCED: self.reduced * batch,
            Mode.SLICED: self.reduced,
            Mode.TILED: self.tiled,
        }
        return activations[mode] + self.result * batch


@dataclass(frozen=True)
class MemoryUse:
    """What was measured for a model, as it declares it, and how its tiles are cut."""

    declared: type[Model]
    reduces: bool
    """Whether it runs in reduced memory; where it does not, slices and tiles are run as diffusers does."""
    tile_pixels: int
    """Of one frame in one tile."""

    def estimate(self, task: Task, layout: Layout, shape: Sequence[int], itemsize: int) -> Estimate:
        """Of a forward pass over inputs of this shape, in a dtype of `itemsize` bytes.

        With a quarter on top for what the measurement does not see: the workspaces of convolutions.
        """
        frame, frames = layout.frame_pixels(task, shape), layout.frames(task, shape)
        peak = self.declared.peak[task]
        full = 1.25 * peak.values(frames) * itemsize
        reduced = 1.25 * peak.reduced_values(frames) * itemsize if self.reduces else full
        result = frame * frames * JOINING[task] * itemsize
        return Estimate(
            int(frame * full), int(frame * reduced), int(min(frame, self.tile_pixels * peak.tile) * reduced), result
        )


JOINING: dict[Task, int] = {"decode": 15, "encode": 9}
"""Numbers for each pixel and frame: the overlapping tiles, the rows of them, the result and its copy in [-1, 1]."""


def choose_modes(estimate: Estimate, batch: int, free: int, capacity: int, offered: Sequence[Mode]) -> list[Mode]:
    """The modes to try, in this order: the first that fits in `free` bytes, then those that need less.

    Where none fits now, it is the last all the same: the estimate has a margin. None where it needs more than
    `capacity`, the device's whole memory.

    Args:
        offered: what the model has, from the best.
    """
    if estimate.of(offered[-1], batch) > capacity:
        return []
    return [mode for mode in offered if estimate.of(mode, batch) <= free] or [offered[-1]]


def is_out_of_memory(error: Exception) -> bool:
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
