from pathlib import Path

import psutil
import pytest
import torch

from handlers.serving import memory
from handlers.serving.layout import Layout
from handlers.serving.memory import Estimate, MemoryUse, Mode, choose_modes

IMAGE = Layout("image", latent_channels=4, vae_scale_factor=8)
VIDEO = Layout("video", latent_channels=16, vae_scale_factor=8, frame_factor=4)


@pytest.mark.parametrize(
    ("batch", "free", "expected"),
    [
        (1, 1000, [Mode.FULL, Mode.REDUCED, Mode.TILED]),
        (1, 99, [Mode.REDUCED, Mode.TILED]),
        (1, 49, [Mode.TILED]),
        (1, 1, [Mode.TILED]),  # it is tried all the same: an estimate may be too high
        (4, 400, [Mode.FULL, Mode.REDUCED, Mode.SLICED, Mode.TILED]),
        (4, 399, [Mode.REDUCED, Mode.SLICED, Mode.TILED]),
        (4, 199, [Mode.SLICED, Mode.TILED]),
        (4, 49, [Mode.TILED]),
    ],
)
def test_the_best_mode_that_fits_comes_first(batch: int, free: int, expected: list[Mode]) -> None:
    assert choose_modes(Estimate(full=100, reduced=50, tiled=10), batch, free, capacity=1000) == expected


def test_what_needs_more_than_the_whole_device_has_no_mode() -> None:
    assert choose_modes(Estimate(full=100, reduced=50, tiled=10), batch=1, free=9, capacity=9) == []


def test_estimates_grow_with_the_pixels_of_the_result() -> None:
    use = MemoryUse(full=800, reduced=400, tile_pixels=64 * 64, frames_at_once=1)
    decoded = use.estimate("decode", IMAGE, (2, 4, 128, 128), itemsize=2)
    assert decoded.full == 1024 * 1024 * (800 * 1.25 + 9) * 2
    assert decoded.reduced == 1024 * 1024 * (400 * 1.25 + 9) * 2
    assert decoded.tiled == (64 * 64 * 400 * 1.25 + 1024 * 1024 * 9) * 2
    assert use.estimate("encode", IMAGE, (1, 3, 1024, 1024), itemsize=4).full == 2 * decoded.full


def test_a_video_counts_the_frames_that_are_in_memory_at_once() -> None:
    use = MemoryUse(full=1000, reduced=400, tile_pixels=64 * 64, frames_at_once=17)
    for latent_frames, frames, at_once in ((3, 9, 9), (16, 61, 17)):
        estimate = use.estimate("decode", VIDEO, (1, 16, latent_frames, 8, 8), itemsize=4)
        assert estimate.full == 64 * 64 * (at_once * 1250 + frames * 9) * 4


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
    cpu = torch.device("cpu")
    assert (memory.total_memory(cpu), memory.free_memory(cpu)) == (2_000_000_000, 1_500_000_000)
    (tmp_path / limit).write_text("max\n")
    assert memory.total_memory(cpu) == psutil.virtual_memory().total
