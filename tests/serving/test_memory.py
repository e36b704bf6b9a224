from pathlib import Path

import psutil
import pytest
import torch

from handlers.model import Model, Peak
from handlers.serving.layout import Layout
from handlers.serving.vae import memory
from handlers.serving.vae.memory import JOINING, Estimate, MemoryUse, Mode, choose_modes

IMAGE = Layout("image", 4, 8)
VIDEO = Layout("video", 16, 8, (1, 5, 9), 5)
ESTIMATE = Estimate(fast=90, full=90, reduced=40, tiled=5, result=10)


class Declared(Model):
    peak = {"decode": Peak(800, 500, 4, reduced=0.5), "encode": Peak(700)}


@pytest.mark.parametrize(
    ("batch", "free", "expected"),
    [
        (1, 1000, [Mode.FULL, Mode.REDUCED, Mode.TILED]),
        (1, 99, [Mode.REDUCED, Mode.TILED]),
        (1, 49, [Mode.TILED]),
        (1, 1, [Mode.TILED]),  # it is tried all the same, because an estimate may be too high
        (4, 400, [Mode.FULL, Mode.REDUCED, Mode.SLICED, Mode.TILED]),
        (4, 399, [Mode.REDUCED, Mode.SLICED, Mode.TILED]),
        (4, 199, [Mode.SLICED, Mode.TILED]),
        (4, 79, [Mode.TILED]),
    ],
)
def test_the_best_mode_that_fits_comes_first(batch: int, free: int, expected: list[Mode]) -> None:
    offered = [mode for mode in Mode if mode is not Mode.FAST and (batch > 1 or mode is not Mode.SLICED)]
    assert choose_modes(ESTIMATE, batch, free, 1000, offered) == expected


def test_only_modes_of_the_model_are_chosen() -> None:
    assert choose_modes(ESTIMATE, 2, 1000, 1000, [Mode.SLICED]) == [Mode.SLICED]
    assert choose_modes(ESTIMATE, 1, 1000, 1000, [Mode.FAST, Mode.REDUCED]) == [Mode.FAST, Mode.REDUCED]
    assert choose_modes(ESTIMATE, 2, 1, 1000, [Mode.FULL, Mode.SLICED]) == [Mode.SLICED]


def test_a_request_larger_than_the_device_has_no_mode() -> None:
    assert choose_modes(ESTIMATE, 1, 14, 14, [Mode.FULL, Mode.TILED]) == []


def test_estimates_grow_with_the_number_of_pixels() -> None:
    use = MemoryUse(Declared, reduces=True, tile_pixels=64 * 64)
    decoded = use.estimate("decode", IMAGE, (2, 4, 128, 128), itemsize=2)
    assert decoded.full == 1024 * 1024 * 800 * 1.25 * 2
    assert decoded.reduced == decoded.full / 2
    assert decoded.tiled == 64 * 64 * 400 * 1.25 * 2
    assert decoded.result == 1024 * 1024 * JOINING["decode"] * 2
    encoded = use.estimate("encode", IMAGE, (1, 3, 1024, 1024), itemsize=4)
    assert encoded.full == 1024 * 1024 * 700 * 1.25 * 4


def test_slices_and_tiles_of_an_unreduced_model_count_in_full() -> None:
    decoded = MemoryUse(Declared, reduces=False, tile_pixels=64 * 64).estimate("decode", IMAGE, (2, 4, 16, 16), 2)
    assert decoded.full == decoded.reduced
    assert decoded.needed(Mode.SLICED, 2) == decoded.full + 2 * decoded.result
    assert decoded.tiled == decoded.full * 64 * 64 / (128 * 128)


def test_a_video_counts_the_frames_in_memory_at_once() -> None:
    use = MemoryUse(Declared, reduces=True, tile_pixels=64 * 64)
    for latent_frames, frames, values in ((1, 1, 800), (2, 5, 2300), (16, 61, 2300)):
        estimate = use.estimate("decode", VIDEO, (1, 16, latent_frames, 8, 8), itemsize=4)
        assert estimate.full == 64 * 64 * values * 1.25 * 4
        assert estimate.result == 64 * 64 * frames * JOINING["decode"] * 4


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_errors_about_memory_are_known(error: Exception) -> None:
    assert memory.is_out_of_memory(error, CPU)


@pytest.mark.parametrize(("free", "expected"), [(0.1, True), (0.2, False)])
@pytest.mark.parametrize(
    "text",
    [
        "GET was unable to find an engine to execute this computation",  # of torch 2.11, for a convolution
        "FIND was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    ],
)
def test_an_error_of_cudnn_is_about_memory_if_little_is_free(
    text: str, free: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: free * memory.total_memory(device))
    assert memory.is_out_of_memory(RuntimeError(text), CPU) is expected
    assert not memory.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"), CPU)


@pytest.mark.parametrize("names", [("memory.max", "memory.current", "memory.stat"), ("v1",)])
def test_a_containers_limit_counts(names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used, stat = (
        names if len(names) == 3 else [f"memory/memory.{n}" for n in ("limit_in_bytes", "usage_in_bytes", "stat")]
    )
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text("2000000000\n")
    (tmp_path / used).write_text("900000000\n")
    (tmp_path / stat).write_text("anon 500000000\ninactive_file 400000000\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert (memory.total_memory(CPU), memory.free_memory(CPU)) == (2_000_000_000, 1_500_000_000)
    (tmp_path / limit).write_text("max\n")
    assert memory.total_memory(CPU) == psutil.virtual_memory().total
