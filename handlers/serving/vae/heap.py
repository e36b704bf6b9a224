"""Heap of the process on a CPU, and torch's allocator on a GPU: which freed memory is kept for the next pass.

A decode allocates and frees tensors of hundreds of MB. By default glibc returns them to the system, so that all pages
are mapped and zeroed again, which is half of the time of a pass. `configure` makes glibc keep them. But free blocks of
one shape fit badly for the next shape, so a heap that returns nothing grows with each new shape. Therefore:

- `settle`, after a pass: all free pages are returned if the process grew by more than its largest pass did, and the
  shape is a new one.
- `make_room`, before a pass: free pages are returned if the pass may need them. If there is still less than `HOLES`
  times its estimate, blocks from 1 MB are mapped one by one for this pass: slower, but without holes.
- `trim`, on an idle device (`devices.IDLE_SECONDS`): all free pages are returned.
- `MAX_KERNELS` bounds oneDNN's compiled kernels, which no trim frees.

All figures are resident bytes, as the system counts them, because the heap does not know which of its free pages are in
memory. benchmarks/NOTES.md has the measurements and the alternatives. Without glibc (macOS, musl), nothing here has an
effect.
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
"""Growth that is kept, as a multiple of the growth in the largest pass."""
HOLES = 5
"""Most bytes that the heap grows by for each byte of a pass's estimate: 2.1 were measured in an empty heap, and up to
4.8 after passes of other shapes."""
SMALL_BLOCK = 2**20
"""Bytes from which blocks are mapped one by one, if memory is short."""
LARGE_BLOCK = 2**30
"""Bytes from which blocks are always mapped one by one."""
MAX_KERNELS = 256
"""Compiled kernels that oneDNN keeps, some 100 KB each; by default 1,024. Each shape has its own: 55 to 85 for an image
VAE's encode and decode, and up to 168 for a video VAE's (CogVideoX in bfloat16)."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's `mallopt`, from malloc.h."""


class Heap:
    """The heap of the process. There is one object, `HEAP`."""

    def __init__(self) -> None:
        self.reserve = 0
        """Bytes reserved for the bodies of other requests."""
        self.base = 0
        """Resident bytes after the last trim."""
        self.floor = sys.maxsize
        """Fewest resident bytes after a trim."""
        self.largest = 0
        """Most resident bytes that the process grew by in a pass."""
        self.needed = 0
        """Estimated bytes of the last pass."""
        self.repeated = False
        """True if the pass before it had the same estimate, so its blocks have the same sizes."""
        self.planned = 0
        """Estimated bytes of the current pass; 0 between passes."""
        self.before = 0
        """Resident bytes when the current pass began."""
        self.claimed = 0
        """Bytes that threads use beside the passes; see `claim`."""
        self._claims = Lock()

    def configure(self, keep_pages: bool) -> None:
        """Use one heap for all threads, so that each can use what another frees.

        Args:
            keep_pages: keep free pages. A process that computes on a GPU does not need them.
        """
        _mallopt(M_ARENA_MAX, 1)
        if keep_pages:
            _mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
            _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            _set_default("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(MAX_KERNELS), "DNNL_PRIMITIVE_CACHE_CAPACITY")

    def trim(self) -> None:
        """Return all free pages to the system."""
        _return_pages()
        self.base = _resident()
        self.floor = min(self.floor, self.base)

    def available(self) -> int:
        """Return the bytes that a pass can get now."""
        return _available() - self.reserve - self.claimed

    def capacity(self) -> int:
        """Return the most bytes that a pass can ever get."""
        if not self.base:
            self.trim()
        return total_memory(torch.device("cpu")) - self.reserve - self.floor

    def make_room(self, needed: int) -> None:
        """Prepare for a pass with an estimate of `needed` bytes."""
        self.repeated, self.needed = needed == self.needed, needed
        if short := self.available() < needed * HOLES:
            self.trim()
            short = self.available() < needed * HOLES
        _mallopt(M_MMAP_THRESHOLD, SMALL_BLOCK if short else LARGE_BLOCK)

    @contextmanager
    def claim(self, size: int, reserved: int = 0) -> Iterator[None]:
        """Claim bytes for work on a thread, such as decoding an image, in a `with` block.

        Args:
            reserved: further bytes that the work takes, which count among the request's bytes in flight.

        Raises:
            RequestError: the bytes are not free now (503), or the process can never have them (422).
        """
        with self._claims:
            if self._spare() < size + reserved:
                _return_pages()
            if self._spare() < size + reserved:
                need = f"reading the body takes about {(size + reserved) / 1e6:.0f} MB of memory"
                most = self.capacity() + self.reserve  # when no other request has bytes in flight
                if most < size + reserved:
                    raise RequestError(f"{need}, and the service has {most / 1e6:.0f} MB for it", 422)
                raise RequestError(f"{need}, which are not free now; try again soon", 503)
            self.claimed += size
        try:
            yield
        finally:
            with self._claims:
                self.claimed -= size

    def _spare(self) -> int:
        """Return the free bytes that neither the current pass nor a thread will take."""
        growth = max(0, _resident() - self.before)
        return _available() - self.claimed - max(0, self.planned - growth)

    @contextmanager
    def settle(self) -> Iterator[None]:
        """Run a pass in a `with` block. Keep its free pages, unless they take more memory than stays available."""
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
    """Let torch's allocator build GPU memory from pages, so that free memory fits any shape.

    By default it keeps blocks of the requested sizes, which other shapes fragment. This works only before the first use
    of CUDA, and does not change what the user set. Source: `expandable_segments` in torch's notes on CUDA.
    """
    _set_default("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def _set_default(variable: str, value: str, *others: str) -> None:
    """Set a variable of the environment, unless the user set it, by this name or another."""
    if not {variable, *others} & os.environ.keys():
        os.environ[variable] = value


def _return_pages() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(parameter: int, value: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(parameter, value)


def _resident() -> int:
    return psutil.Process().memory_info().rss


def _available() -> int:
    return free_memory(torch.device("cpu"))
