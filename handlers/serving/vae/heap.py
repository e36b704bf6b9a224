"""The process's heap on a CPU, and torch's on a GPU: what of freed memory is kept for the next pass, and what is not.

A decode makes and frees tensors of up to hundreds of MB. glibc takes those from the system and gives them back, so that
each page is mapped and zeroed anew, which is half of the time of a pass. `keep` makes it keep them. But what was freed
by passes of one shape is full of holes for the next, small blocks in between, so that a heap which gives nothing back
grows with each new shape. So:

- `settle`, after a pass: where the process holds clearly more than the largest pass took, all free pages go back; not
  while one shape is repeated, which takes nothing new after a few passes. Of mixed shapes several share the cost.
- `make_room`, before a pass: where it may not find enough beside the pages that are kept, they go back first. Where
  even then there is less than `HOLES` times what its tensors take, each block of a MB and more is mapped by itself for
  this pass: slower, but without holes.
- `trim`, when nothing has come for some seconds (`devices.IDLE_SECONDS`): all free pages go back.

- oneDNN's compiled kernels, which no trim reaches, are kept for the last shapes alone (`KERNELS`).

All figures are resident bytes, as the system counts them: the heap's own do not say which of its free pages are still
in memory. So the plan (`memory.free_memory`) counts nothing that the heap keeps. What was weighed: benchmarks/NOTES.md.

Without glibc (macOS, musl) all of this does nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock

import psutil
import torch

from handlers.serving.errors import RequestError
from handlers.serving.vae.memory import free_memory, total_memory

MARGIN = 1.1
"""What may be kept, in parts of what the largest pass took."""
HOLES = 5
"""Bytes that the heap may grow by for each byte of a pass's estimate: 2.1 were measured where it was empty, and up to
4.8 where other shapes had left their holes."""
SMALL_BLOCK = 2**20
"""Bytes; where memory is short, blocks from this size are mapped by themselves."""
LARGE_BLOCK = 2**30
"""Bytes; larger ones always are."""
KERNELS = 256
"""Compiled kernels that oneDNN keeps. Each shape has its own, some 100 KB each, and by default 1,024 stay for ever. An
encode and a decode of one shape need up to 168 (CogVideoX in bfloat16), those of an image's VAE 55 to 85."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h."""


class Heap:
    """One for the whole process: `HEAP`."""

    def __init__(self) -> None:
        self.reserve = 0
        """Bytes that are left to other requests, whose bodies come at any time."""
        self.base = 0
        """Resident bytes after the free pages were last given back."""
        self.floor = sys.maxsize
        """The fewest of these: what the process always holds."""
        self.largest = 0
        """The most resident bytes that the process grew by in a pass."""
        self.needed = 0
        """Bytes of the last pass's tensors."""
        self.repeated = False
        """Whether the pass before it needed as many: their blocks are of the same sizes then."""
        self.planned = 0
        """Bytes that the pass which runs now takes at its peak, by its estimate; 0 between passes."""
        self.before = 0
        """Resident bytes when that pass began."""
        self.lent = 0
        """Bytes that threads take beside the passes for a while, and that no request holds: see `lend`."""
        self.lending = Lock()

    def keep(self, pages: bool) -> None:
        """One heap for all threads, which by itself gives nothing back if `pages` are kept; a GPU's process needs none.

        By default each thread has one of its own, so that what one frees another cannot use. The number of kernels is
        read by oneDNN when torch first computes.
        """
        _mallopt(M_ARENA_MAX, 1)
        if pages:
            _mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
            _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            _set_default("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS), "DNNL_PRIMITIVE_CACHE_CAPACITY")

    def trim(self) -> None:
        """Gives every free page back to the system."""
        _give_back()
        self.base = _resident()
        self.floor = min(self.floor, self.base)

    def available(self) -> int:
        """Bytes that a pass could get now."""
        return _available() - self.reserve - self.lent

    def capacity(self) -> int:
        """Bytes that a pass could get at best."""
        if not self.base:
            self.trim()
        return total_memory(torch.device("cpu")) - self.reserve - min(self.floor, self.base)

    def make_room(self, needed: int) -> None:
        """Before a pass whose tensors take so many bytes at their peak."""
        self.repeated, self.needed = needed == self.needed, needed
        if short := self.available() < needed * HOLES:
            self.trim()
            short = self.available() < needed * HOLES
        _mallopt(M_MMAP_THRESHOLD, SMALL_BLOCK if short else LARGE_BLOCK)

    @contextmanager
    def lend(self, size: int, reserved: int = 0) -> Iterator[None]:
        """Around work on a thread that takes so many bytes for as long as it lasts, such as an image that is decoded.

        Args:
            held: bytes that are taken too, but are counted among those of the request, which passes leave to it.

        Raises:
            RequestError: they are not free now, beside what others were promised; status 503.
        """
        with self.lending:
            if self._spare() < size + reserved:
                _give_back()
            if self._spare() < size + reserved:
                needed = (size + reserved) / 1e6
                raise RequestError(
                    f"reading this takes about {needed:.0f} MB of memory, which are not free now; try again soon", 503
                )
            self.lent += size
        try:
            yield
        finally:
            with self.lending:
                self.lent -= size

    def _spare(self) -> int:
        """Bytes that nobody has, and that neither the pass which runs now nor a thread is going to take."""
        growth = max(0, _resident() - self.before)
        return _available() - self.lent - max(0, self.planned - growth)

    @contextmanager
    def settle(self) -> Iterator[None]:
        """Around a pass. What is kept is also no more than what stays available to the rest of the service."""
        if not self.base:
            self.trim()
        self.before = _resident()
        try:
            yield
        finally:
            self.planned = 0
            after = _resident()
            self.largest = max(self.largest, after - self.before)
            kept = after - self.base
            if kept > self.available() or (kept > self.largest * MARGIN and not self.repeated):
                self.trim()


HEAP = Heap()


def map_gpu_memory() -> None:
    """Has torch's allocator put GPU memory together from pages, so that what is free fits any shape.

    By default it keeps blocks of the sizes that were asked for, each of them fragmented by the next shapes. Works only
    before CUDA is first used; what is set already stays. Source: `expandable_segments` in torch's notes on CUDA.
    """
    _set_default("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def _set_default(variable: str, value: str, *others: str) -> None:
    """Sets it in the environment, unless the user set it, by this name or one of the others."""
    if not {variable, *others} & os.environ.keys():
        os.environ[variable] = value


def _give_back() -> None:
    """Free pages of the heap to the system."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(parameter: int, value: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(parameter, value)


def _resident() -> int:
    return psutil.Process().memory_info().rss


def _available() -> int:
    return free_memory(torch.device("cpu"))
