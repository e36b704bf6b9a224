"""The benchmark's own arithmetic and tables, and a run of it at toy sizes; the real one is `make bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench, forward, report, streams, ways
from benchmarks.peak import allocated_peak, peak_bytes
from benchmarks.seeds import SEEDS
from benchmarks.service import Client, Load, percentiles
from handlers import MODELS

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


def test_the_allocators_peak_counts_what_an_operator_takes_inside_itself_too() -> None:
    def call() -> torch.Tensor:
        return torch.linalg.inv(torch.eye(64))

    assert allocated_peak(lambda: KIBIBYTE + 1, torch.device("cpu")) == pytest.approx(1024, abs=16)
    assert allocated_peak(call, torch.device("cpu")) > peak_bytes(call)


def test_a_ratio_is_of_calls_that_took_turns() -> None:
    turns: list[str] = []
    calls = {side: lambda side=side: turns.append(side) for side in ("a", "b")}
    assert {side: len(times) for side, times in forward.by_turns(calls, torch.device("cpu"), 2).items()} == {
        "a": 2,
        "b": 2,
    }
    assert turns == ["a", "b", "a", "b"]
    assert forward.time_ratio([1, 10, 100], [2, 20, 50]) == 0.5


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
    way = {"model": "sd-v1", "size": [256, 256, None], "dtype": "float32", "eager_peak_mb": 192.0}
    way |= {"eager_psnr_db": None, "eager_seconds": 2.0, "first_call_seconds": 2.5, "psnr_db": 115.0}
    return {
        "about": {
            "kind": "cpu",
            "fast": False,
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
        "ways": [
            {**way, "way": "channels_last", "seconds": 1.8, "time_ratio": 0.9, "peak_mb": 192.0, "peak_ratio": 1.0},
            {**way, "way": "compiled", "failed": "InductorError: no a|b compiler"},
        ],
        "throughput": [served],
        "pilot": [],
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
        "stream": [
            {
                "model": "hunyuan-video",
                "size": [320, 512, 61],
                "count": 3,
                "whole_seconds": 10,
                "first_byte_seconds": 2,
                "first_frame_seconds": 2.1,
                "last_byte_seconds": 10,
                "first_byte_share": 0.2,
            }
        ],
    }


def test_the_report_says_of_each_target_whether_it_is_met(results: dict[str, Any], tmp_path: Path) -> None:
    report.write(results, tmp_path)
    report.plots(results, tmp_path)
    text = (tmp_path / "README.md").read_text()
    rows = {
        line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "at least" in line or "at most" in line
    }
    assert len(rows) == 15
    assert [line.count("not yet measured (needs a GPU)") for line in rows.values()].count(1) == 8
    by_start = {
        start: next(line for what, line in reversed(rows.items()) if what.startswith(start))
        for start in ("time", "throughput at", "`/h", "peak memory against plain diffusers, full")
    }
    assert by_start["throughput at"].endswith("| 0.98 | met |")
    assert by_start["time"].endswith("| 0.85 | met |")
    assert by_start["`/h"].endswith("| 80 | **not met** |")
    assert by_start["peak memory against plain diffusers, full"].endswith("| 0.56 | met |")
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "results.json", "time.png", "memory.png"}
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_the_table_puts_each_pass_beside_plain_diffusers(results: dict[str, Any]) -> None:
    *_, row = report.forward_table(results["forward"]).splitlines()
    assert "| 2.000 | x 1.01 | x 0.85 | x 0.79 | 192 | x 1.00 | x 0.94 | x 0.56 |  |  | 119 | 120 | 0.80 |" in row


def test_a_way_that_fails_is_one_line_of_its_table(results: dict[str, Any]) -> None:
    _, _, eager, ran, failed = report.ways_table(results["ways"]).splitlines()
    assert "| eager | 2.000 |  | 192 |  |  |  |" in eager
    assert "| channels_last | 1.800 | 0.90 | 192 | 1.00 | 115 | 2.5 |" in ran
    assert r"| compiled | failed: InductorError: no a\|b compiler |" in failed


def without_a_compiler(model: Any, latents: torch.Tensor) -> Any:
    raise RuntimeError("no C compiler\nand much more")


def test_ways_are_compared_with_eager() -> None:
    plain, _ = forward.load("tiny", "cpu")
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    eager = ways.Eager("tiny", plain, (64, 64, None), 1)
    for name in ("fast", "data movement only", "channels_last", "reduced memory"):
        row = eager.compare(name, ways.WAYS[name])
        assert "failed" not in row
        assert row["psnr_db"] is None or row["psnr_db"] > 40
        assert row["peak_mb"] > 0
    assert eager.compare("compiled", without_a_compiler)["failed"] == "RuntimeError: no C compiler"
    assert all(weight.equal(before[name]) for name, weight in plain.state_dict().items())
    assert all(weight.is_contiguous() for weight in plain.state_dict().values())


def test_a_run_writes_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    size = 64
    plan = bench.Plan(
        decode=(),
        encode=(),
        video=(),
        own={},
        repeats=1,
        fast=False,
        ways={"tiny": (size, size, None)},
        served=(Load("tiny", size, "jpg", 2, 4, rounds=1),),
        pilot=Load("tiny", size, "png", 2, 4, rounds=1),
        latency=("tiny", size),
        latency_count=2,
        queue=("tiny", (size, size, None), 2),
        data_set=("tiny", size, 8),
        stream=("hunyuan-video", (32, 48, 25)),
        fake=(("tiny", "decode", (size, size, None)),),
    )
    monkeypatch.setattr(bench, "CPU", plan)
    monkeypatch.setattr(bench, "TINY", size)
    monkeypatch.setattr(bench, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(ways, "WAYS", {"channels_last": ways.channels_last, "compiled": without_a_compiler})
    bench.main(device="cpu", models="tiny")
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"README.md", "results.json", "time.png", "memory.png"}
    results = json.loads((folder / "results.json").read_text())
    counts = {name: len(rows) for name, rows in results.items() if isinstance(rows, list)}
    assert counts == {"forward": 2, "fake_peaks": 1, "ways": 2, "latency": 2, "throughput": 1, "pilot": 1} | {
        "queue": 1,
        "data_set": 1,
        "stream": 0,
    }
    assert "failed: RuntimeError: no C compiler" in (folder / "README.md").read_text()


def test_the_first_bytes_of_a_stream_are_timed(running: Any) -> None:
    row = streams.first_bytes(running("hunyuan-video").url, "hunyuan-video", (32, 48, 25))
    assert 0 < row["first_byte_seconds"] <= row["first_frame_seconds"] <= row["last_byte_seconds"]
    assert f"| hunyuan-video | 48x32, 25 frames | {row['whole_seconds']:.2f} |" in report.stream_table([row])


def test_a_client_gets_answers_of_every_form(running: Any) -> None:
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
