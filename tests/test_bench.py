"""The benchmark's own arithmetic; a run of it takes minutes and is for `make bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from handlers import MODELS
from scripts.benchmark import forward, report
from scripts.benchmark.peak import peak_bytes
from scripts.benchmark.seeds import SEEDS
from scripts.benchmark.service import Client, percentiles

KIBIBYTE = torch.empty(256)  # of float32


def test_the_peak_counts_what_is_alive_at_a_time() -> None:
    def call() -> torch.Tensor:
        a = KIBIBYTE + 1
        b = a * 2  # two are alive here
        del a
        return (b - 1).view(16, 16).add_(1)  # and here; neither a view nor an in-place step takes more

    assert peak_bytes(call) == 2 * 1024


def test_the_peak_leaves_out_what_was_there_before() -> None:
    assert peak_bytes(lambda: KIBIBYTE.add_(0)) == 0


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentiles([float(value) for value in range(100)]) == {"p50": 50, "p95": 95, "p99": 99}
    assert percentiles([7.0]) == {"p50": 7, "p95": 7, "p99": 7}


@pytest.mark.parametrize(("task", "tflop"), [("decode", 2.5), ("encode", 1.1)])
def test_the_floor_is_the_arithmetic_of_a_picture(task: str, tflop: float) -> None:
    assert forward.flops("sd-v1", task, (512, 512, None)) / 1e12 == pytest.approx(tflop, rel=0.05)


def test_psnr_is_of_a_range_of_two() -> None:
    exact = torch.zeros(4)
    assert forward.peak_signal_noise_ratio(exact + 0.02, exact) == pytest.approx(40, abs=1e-3)
    assert forward.peak_signal_noise_ratio(exact, exact) is None


def test_the_seeds_figures_are_in_mb() -> None:
    seed = next(seed for seed in SEEDS if (seed.model, seed.gpu, seed.size) == ("sd-v1", "RTX 4090", 1024))
    assert seed.memory_mb == pytest.approx(0.2 * 24 * 1024)


@pytest.fixture
def results() -> dict[str, Any]:
    """Made up, of a CPU."""
    compared = {
        "model": "sd-v1",
        "task": "decode",
        "size": [256, 256, None],
        "dtype": "float32",
        "seconds": {"plain": 2.0, "project": 1.5},
        "time_ratio": 0.75,
        "peak_mb": {"plain": 192.0, "project": 108.0},
        "peak_ratio": 0.56,
        "memory_percent": 0.5,
        "psnr_db": {"plain": None, "project": 120.0},
        "tflop": 0.6,
        "share_of_floor": 0.8,
    }
    ms = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    served = {"model": "sd-v1", "size": [256, 256, None], "format": "jpg", "clients": 8, "count": 32}
    served |= {"per_second": 0.98, "bare_per_second": 1.0, "ratio": 0.98, "latency_ms": ms, "health_ms": {"p99": 80.0}}
    served |= {"client_cpu": 0.01}
    return {
        "about": {
            "kind": "cpu",
            "device": "a CPU",
            "threads": 2,
            "load_average": 0.1,
            "commit": "abc",
            "date": "2026-01-01",
            "seconds": 1,
            "versions": {"torch": "2"},
            "matrix_tflops": {"float32": 0.2},
        },
        "forward": [compared],
        "fake_peaks": [{**compared, "size": [1024, 1024, None]}],
        "throughput": [served],
        "pilot": [],
        "latency": [],
    }


def test_the_report_says_of_each_target_whether_it_is_met(results: dict[str, Any], tmp_path: Path) -> None:
    report.write(results, tmp_path)
    text = (tmp_path / "README.md").read_text()
    rows = {
        line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "at least" in line or "at most" in line
    }
    assert len(rows) == 9
    assert [line.count("not yet measured (needs a GPU)") for line in rows.values()].count(1) == 5
    by_start = {
        start: next(line for what, line in rows.items() if what.startswith(start)) for start in ("thr", "`/h", "pe")
    }
    assert by_start["thr"].endswith("| 0.98 | met |")
    assert by_start["`/h"].endswith("| 80 | **not met** |")
    assert by_start["pe"].endswith("| 0.56 | met |")
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "time.png", "memory.png"}


def test_a_client_gets_answers_of_every_form(running: Any) -> None:
    endpoint = running("sd-v1")
    for image_format in ("jpg", "png", "uint8"):
        with Client(endpoint.url, "sd-v1", (64, 64, None), image_format) as client:
            whole, vae = client.post()
        assert 0 < vae < whole


def test_every_model_has_inputs() -> None:
    for key, model in MODELS.items():
        size = (64, 96, 5 if model.kind == "video" else None)
        assert forward.inputs(key, "decode", size).shape[-2:] == (8, 12)
        assert forward.inputs(key, "encode", size).shape[-2:] == (64, 96)
