"""Memory of a pass: its estimate, the free memory, and the modes that fit."""

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
    """Modes of a pass, best first."""

    FAST = "fast"
    """Full frame through `fast`: the same pixels except for rounding."""
    FULL = "full"
    """diffusers' own pass."""
    REDUCED = "reduced"
    """Full frame through `low_memory`: the same pixels except for rounding."""
    SLICED = "sliced"
    """Reduced memory, one item of the batch after the other."""
    TILED = "tiled"
    """Overlapping tiles that are blended: seams may show."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one item of a batch at the peak of a pass."""

    fast: int
    """Activations of diffusers' own pass in the dtype of the fast pass, which takes less."""
    full: int
    reduced: int
    tiled: int
    result: int
    """Result, and the tiles that it is joined from."""
    workspace: int = 0
    """Bytes of the fast pass that do not depend on the size of the input or the batch."""

    def needed(self, mode: Mode, batch: int) -> int:
        """Return the bytes of a batch in this mode."""
        activations = {
            Mode.FAST: self.fast * batch + self.workspace,
            Mode.FULL: self.full * batch,
            Mode.REDUCED: self.reduced * batch,
            Mode.SLICED: self.reduced,
            Mode.TILED: self.tiled,
        }
        return activations[mode] + self.result * batch

    def least(self, modes: Sequence[Mode], batch: int) -> Mode:
        """Return the mode that needs the fewest bytes for a batch."""
        return min(reversed(modes), key=lambda mode: self.needed(mode, batch))


@dataclass(frozen=True)
class MemoryUse:
    """Measurements that a model declares, and its tiles."""

    declared: type[Model]
    reduces: bool
    """True if `low_memory` knows the model. If not, slices and tiles run diffusers' own pass."""
    tile_pixels: int
    """Pixels of one frame in one tile."""

    def estimate(
        self,
        task: Task,
        layout: Layout,
        shape: Sequence[int],
        itemsize: int,
        fast_itemsize: int | None = None,
        workspace: int = 0,
    ) -> Estimate:
        """Estimate a pass over inputs of this shape, in a dtype of `itemsize` bytes.

        The fast pass may have another dtype, of `fast_itemsize` bytes, and takes `workspace` bytes for any shape.

        The factor 1.25 covers the workspaces of convolutions, which the measurements do not include.
        """
        frame, frames = layout.frame_pixels(task, shape), layout.frames(task, shape)
        peak = self.declared.peak[task]
        full = 1.25 * peak.values(frames) * itemsize
        reduced = 1.25 * peak.reduced_values(frames) * itemsize if self.reduces else full
        result = frame * frames * JOINING[task] * itemsize
        return Estimate(
            int(frame * full / itemsize * (fast_itemsize or itemsize)),
            int(frame * full),
            int(frame * reduced),
            int(min(frame, self.tile_pixels * peak.tile) * reduced),
            result,
            workspace,
        )


JOINING: dict[Task, int] = {"decode": 15, "encode": 9}
"""Values per pixel and frame: the overlapping tiles, rows of tiles, the result and its copy in [-1, 1]."""


def choose_modes(estimate: Estimate, batch: int, free: int, capacity: int, offered: Sequence[Mode]) -> list[Mode]:
    """Return the modes to try: those that fit in `free` bytes, best first.

    If none fits now, return the one that needs least, because the estimate has a margin. If it exceeds `capacity`, the
    whole memory of the device, return no mode.

    Args:
        offered: modes of the model, best first.
    """
    least = estimate.least(offered, batch)
    if estimate.needed(least, batch) > capacity:
        return []
    return [mode for mode in offered if estimate.needed(mode, batch) <= free] or [least]


def is_out_of_memory(error: Exception, device: torch.device) -> bool:
    """Return whether an error is a lack of memory. Only torch's allocator for CUDA has a class for it.

    Some errors have other reasons too. They count if the device has less than an eighth of its memory left.
    """
    if isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY):
        return True
    may_be = any(sign in str(error) for sign in PERHAPS_OUT_OF_MEMORY)
    return may_be and free_memory(device) < total_memory(device) / 8


OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Messages of torch's CPU allocator, the CUDA driver, Triton, cuBLAS, and cuDNN."""
PERHAPS_OUT_OF_MEMORY = ("unable to find an engine to execute this computation", "CUDNN_STATUS_NOT_INITIALIZED")
"""Messages of cuDNN without memory for any algorithm's workspace, or for its own state."""


def free_memory(device: torch.device) -> int:
    """Return the bytes that an allocation on this device could get now.

    A GPU's include the blocks that torch keeps. A CPU's exclude the free pages of the heap, because a large tensor may
    not fit in them.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    if (limit := _container_limit()) and (used := _read_integer("memory.current", "memory/memory.usage_in_bytes")):
        free = min(free, limit - used + _file_cache())
    return free


def total_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min(psutil.virtual_memory().total, _container_limit() or sys.maxsize)


CGROUP = Path("/sys/fs/cgroup")


def _container_limit() -> int | None:
    """Return the bytes that the container may use; None without a limit."""
    return _read_integer("memory.max", "memory/memory.limit_in_bytes")


def _file_cache() -> int:
    """Return the bytes of cached files, which count as used but are freed when memory is short."""
    for name in ("memory.stat", "memory/memory.stat"):
        with suppress(OSError):
            stat = dict(line.split() for line in (CGROUP / name).read_text().splitlines())
            return int(stat.get("inactive_file", 0))
    return 0


def _read_integer(*names: str) -> int | None:
    """Read the first file that exists, for version 2 or 1 of Linux's control groups."""
    for name in names:
        with suppress(OSError, ValueError):  # no such file, or "max"
            return int((CGROUP / name).read_text())
    return None
