"""Tests of the benchmark's arithmetic and tables, and a run at toy sizes. `make bench` is the real run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import accuracy, bench, forward, report
from benchmarks.peak import allocated_peak, peak_bytes
from benchmarks.service import Client, Load, percentiles
from handlers import MODELS

pytestmark = pytest.mark.slow

KIBIBYTE = torch.empty(256)  # the bytes of a float32


def test_the_peak_counts_simultaneous_tensors() -> None:
    def call() -> torch.Tensor:
        a = KIBIBYTE + 1
        b = a * 2  # two tensors exist here
        del a
        return (b - 1).view(16, 16).add_(1)  # two here as well: a view and an in-place operation take no memory

    assert peak_bytes(call) == 2 * 1024


def test_the_peak_excludes_earlier_tensors() -> None:
    assert peak_bytes(lambda: KIBIBYTE.add_(0)) == 0


def test_the_allocators_peak_counts_memory_inside_operators() -> None:
    def call() -> torch.Tensor:
        return torch.linalg.inv(torch.eye(64))

    assert allocated_peak(lambda: KIBIBYTE + 1, torch.device("cpu")) == pytest.approx(1024, abs=16)
    assert allocated_peak(call, torch.device("cpu")) > peak_bytes(call)


def test_calls_alternate_and_the_ratio_is_their_median() -> None:
    turns: list[str] = []
    calls = {name: lambda name=name: turns.append(name) for name in ("a", "b")}
    assert {name: len(times) for name, times in forward.by_turns(calls, torch.device("cpu"), 2).items()} == {
        "a": 2,
        "b": 2,
    }
    assert turns == ["a", "b", "a", "b"]
    assert forward.time_ratio([1, 10, 100], [2, 20, 50]) == 0.5


def test_percentiles_are_measured_values() -> None:
    assert percentiles([float(value) for value in range(100)]) == {"p50": 50, "p95": 95, "p99": 99}
    assert percentiles([7.0]) == {"p50": 7, "p95": 7, "p99": 7}


@pytest.mark.parametrize(("task", "tflop"), [("decode", 10.5), ("encode", 4.9)])
def test_the_floor_is_the_arithmetic_for_an_image(task: str, tflop: float) -> None:
    """Attention, two products of 16384 x 512 x 16384, is 0.55 of it."""
    assert forward.flops("sd-v1", task, (1024, 1024, None)) / 1e12 == pytest.approx(tflop, rel=0.02)


def test_psnr_assumes_a_range_from_minus_1_to_1() -> None:
    exact = torch.zeros(4)
    assert forward.peak_signal_noise_ratio(exact + 0.02, exact) == pytest.approx(40, abs=1e-3)
    assert forward.peak_signal_noise_ratio(exact, exact) is None


@pytest.fixture
def results() -> dict[str, Any]:
    """Return made-up results of a CPU."""
    compared = {
        "model": "sd-v1",
        "task": "decode",
        "size": [256, 256, None],
        "dtype": "float32",
        "seconds": {"plain": 2.0, "project": 2.02, "fast": 1.7, "reduced": 1.6},
        "time_ratio": {"project": 1.01, "fast": 0.85, "reduced": 0.79},
        "peak_mb": {"plain": 192.0, "project": 192.0, "fast": 180.0, "reduced": 108.0},
        "peak_ratio": {"project": 1.0, "fast": 0.94, "reduced": 0.56},
        "memory_percent": 0.5,
        "psnr_db": {"plain": None, "project": None, "fast": 119.0, "reduced": 120.0},
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
        "queue": [],
        "data_set": [
            {
                "model": "tiny",
                "size": [256, 256, None],
                "count": 8,
                "per_second": [],
                "against_loop": 2,
                "against_service": 0.96,
            }
        ],
        "latency": [],
        "openvino": [
            {
                "model": "sd-v1",
                "task": "decode",
                "size": [256, 256, None],
                "dtype": "float32",
                "seconds": 2.0,
                "time_ratio": {"openvino": 0.8, "fast": 0.6},
                "psnr_db": {"openvino": 100.0, "fast": None},
            }
        ],
    }


def test_a_report_has_a_page_figures_and_plots(results: dict[str, Any], tmp_path: Path) -> None:
    report.write(results, tmp_path)
    report.plots(results, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "results.json", "time.png", "memory.png"}
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "Not measured in this run." in (tmp_path / "README.md").read_text()


def test_the_table_compares_each_pass_with_plain_diffusers(results: dict[str, Any]) -> None:
    *_, row = report.forward_table(results["forward"]).splitlines()
    assert "| 2.000 | x 1.01 | x 0.85 | x 0.79 | 192 | x 1.00 | x 0.94 | x 0.56 |  |  | 119 | 120 | 0.80 |" in row


def test_the_fast_pass_is_compared_with_openvino(results: dict[str, Any]) -> None:
    assert "| float32 | 2.000 | x 0.800 | x 0.600 | 0.75 | 100 |  |" in report.openvino_table(results["openvino"])


def test_a_run_writes_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    size = 64
    plan = bench.Plan(
        decode=(),
        encode=(),
        video=(),
        more_decodes={},
        repeats=1,
        openvino=(),
        loads=(Load("tiny", size, "jpg", 2, 4, rounds=1),),
        latency=("tiny", size),
        latency_count=2,
        queue=("tiny", (size, size, None), 2),
        data_set=("tiny", size, 8),
        fake=(("tiny", "decode", (size, size, None)),),
    )
    monkeypatch.setattr(bench, "CPU", plan)
    monkeypatch.setattr(bench, "TINY", size)
    monkeypatch.setitem(forward.MATRIX_SIDES, "cpu", size)
    monkeypatch.setattr(bench, "BENCHMARKS", tmp_path)
    bench.main(device="cpu", models="tiny")
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"README.md", "results.json", "time.png", "memory.png"}
    results = json.loads((folder / "results.json").read_text())
    counts = [(name, len(rows)) for name, rows in results.items() if isinstance(rows, list)]
    expected = {"forward": 2, "openvino": 0, "fake_peaks": 1, "latency": 2, "throughput": 1, "queue": 1, "data_set": 1}
    assert dict(counts) == expected


def test_a_client_gets_every_format(running: Any) -> None:
    endpoint = running("sd-v1")
    for image_format in ("jpg", "png", "uint8"):
        with Client(endpoint.url, "sd-v1", (64, 64, None), image_format) as client:
            whole, vae = client.post()
        assert 0 < vae < whole


def test_every_model_has_inputs() -> None:
    for key, model in MODELS.items():
        size = (64, 96, 5 if model.kind == "video" else None)
        side = model.vae_scale_factor
        assert forward.inputs(key, "decode", size).shape[-2:] == (64 // side, 96 // side)
        assert forward.inputs(key, "encode", size).shape[-2:] == (64, 96)


def test_images_of_a_cpu_have_a_price(results: dict[str, Any]) -> None:
    """An image takes 2.02 s on two cores, which cost $0.033 an hour each."""
    section = report.cost_section(results["about"], results["forward"])
    assert "| sd-v1 | decode | 256x256 | 1,782 | 0.037 | 3,564 | 7,129 | 14,257 |" in section
    assert report.cost_section({**results["about"], "kind": "cuda"}, results["forward"]) == ""


def test_bfloat16_is_less_accurate_than_float32() -> None:
    float32, bfloat16, *diffusers = map(float, accuracy.decibels("tiny", 32))
    assert float32 > 60 > bfloat16 > 45
    assert all(value > 45 for value in diffusers)
