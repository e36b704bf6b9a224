"""The peak memory of a call, in bytes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch.autograd import profiler
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler logs each start and stop


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most bytes that the new tensors of `call` take at a time, including its result.

    Each tensor counts from the operator that creates it to its end, so the figure is the same in each run. Memory
    inside operators does not count. Fake tensors (`torch._subclasses.FakeTensorMode`) work too, without memory or time.
    """
    with _LiveTensors() as live:
        call()
    return live.peak


def allocated_peak(call: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that the allocator of `device` gives out at a time while `call` runs.

    This includes the workspaces of kernels. On a device that is neither CUDA nor a CPU, only tensors count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == "cpu":
        with profiler.profile(profile_memory=True) as profile:
            call()
        events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
        return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return peak_bytes(call)


class _LiveTensors(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.storages: dict[weakref.ref[torch.UntypedStorage], int] = {}
        """Bytes of each storage that exists; 0 for those from before."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self.storages.setdefault(weakref.ref(tensor.untyped_storage(), self._free), 0)
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            reference = weakref.ref(storage, self._free)
            if reference not in self.storages:
                self.storages[reference] = storage.nbytes()
                self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        return result

    def _free(self, reference: weakref.ref[torch.UntypedStorage]) -> None:
        self.current -= self.storages.pop(reference, 0)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
