"""Tests of `benchmarks/gpu.py` and `gpu.sh` on a CPU, at toy sizes, so that no time of a GPU finds their mistakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.utils import canonicalize_name

from benchmarks import bench, forward, gpu
from handlers import MODELS
from handlers.serving.vae.fast import kernels
from handlers.serving.vae.vae import VAE
from scripts.local_server import ROOT
from tests import test_gpu
from tests.support import forked, reference_kernels
from tests.support.checkpoints import build
from tests.support.packages import dependencies


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that runs stages with small models, and returns their results."""
    for name in ("group_norm", "add", "interleave", "rms_norm"):
        monkeypatch.setattr(kernels, name, getattr(reference_kernels, name))
    monkeypatch.setattr(forward, "load", load_small)
    monkeypatch.setitem(forward.MATRIX_SIDES, "cpu", 64)
    monkeypatch.setattr(VAE, "load", lambda declared, *_: VAE(build("wan-2.1"), declared))
    monkeypatch.setenv("OUT", str(tmp_path))

    def run(*stages: str) -> dict[str, list[dict[str, Any]]]:
        gpu.main(",".join(stages), device="cpu", models="sd-v1", seconds=300)
        (file,) = tmp_path.iterdir()
        return json.loads(file.read_text())

    return run


def load_small(key: str, device: str) -> tuple[Any, VAE]:
    model = build(key)
    return deepcopy(model), VAE(model, MODELS[key])


@pytest.mark.slow
def test_the_parts_of_a_pass(results: Any) -> None:
    rows = results("environment", "kernels", "attention", "upsampling", "convolutions", "videos", "transfers")
    assert "failed" not in rows
    assert [row["name"] for row in rows["kernels"]] == ["group_norm", "add", "interleave"] * 4 + ["rms_norm"] * 3
    assert [row["way"] for row in rows["attention"]] == ["slices of queries", "torch's choice"]
    assert len(rows["upsampling"]) == 3 * 5
    assert len(rows["convolutions"]) == 10 * 2
    assert [row["layout"] for row in rows["videos"]] == ["first", "last", "copy"] * 3
    assert len(rows["transfers"]) == 2 * 3
    assert all(row["ms"] > 0 for stage in rows if stage != "environment" for row in rows[stage])


@pytest.mark.slow
def test_the_passes_and_a_video(results: Any) -> None:
    rows = results("passes", "wan")
    assert "failed" not in rows
    assert [row["way"] for row in rows["passes"]] == ["diffusers", "fast", "fast without kernels", "reduced"] * 3
    assert all(row["ms"] > 0 and row["peak_mb"] > 0 and row["planned_mb"] > 0 for row in rows["passes"])
    same = {row["way"]: row["has_the_same_bits"] for row in rows["wan"]}
    assert same == {"diffusers": True, "without folding and kernels": True, "fast": False}


def test_all_upsamplings_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "interleave", reference_kernels.interleave)  # it computes in float64
    x = kernels.channels_last(torch.randn(1, 6, 3, 5, dtype=torch.float64))
    ways = gpu.upsamplings(x, torch.randn(6, 6, 3, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64))
    expected = ways.pop("upsample, then 3x3")()
    del ways["one 2x2 of 4C, the convolution alone"]
    assert len(ways) == 3
    for call in ways.values():
        torch.testing.assert_close(call(), expected, atol=1e-12, rtol=0)


def test_a_stage_that_fails_or_does_not_fit_is_a_result(results: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.Stages, "attention", lambda stages: torch.zeros(2) @ torch.zeros(3))
    monkeypatch.setattr(gpu.Stages, "has_time", lambda stages: "failed" not in stages.results)
    rows = results("attention", "wan")
    assert rows["failed"][0]["stage"] == "attention"
    assert rows["failed"][0]["error"].startswith("RuntimeError: inconsistent tensor size")
    assert rows["skipped"] == [{"stage": "wan"}]


def test_the_stages_of_the_calls_exist() -> None:
    calls = [line.split()[1:3] for line in SCRIPT.splitlines() if line.lstrip().startswith("measure ")]
    assert {stage for _, stages in calls for stage in stages.split(",")} == set(gpu.STAGES)
    first, *second = [int(seconds) + 10 for seconds, _ in calls]
    assert first + 95 <= 290  # of 300 s, with the wheels' installation
    assert sum(second) <= 290


SCRIPT = (ROOT / "benchmarks" / "gpu.sh").read_text()


def test_the_wheels_and_the_machine_have_every_package() -> None:
    wheels = {canonicalize_name(name) for name in re.findall(r"([\w-]+)==", SCRIPT)}
    listed = re.search(r"these packages: (.*?)\.\n", SCRIPT, re.DOTALL)
    assert listed
    machine = dependencies(re.findall(r"[\w-]+", listed[1]))
    service = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    tools = {"uvicorn", "httpx2", "matplotlib", "tenacity"}
    needed = dependencies({*service, *tools} - {"peft"})  # diffusers runs without peft
    assert needed <= wheels | machine


def test_a_warning_of_an_unknown_version_fails_no_test() -> None:
    (options,) = re.findall(r"-m pytest tests/test_gpu.py (.*)", SCRIPT)
    assert " -W default " in options  # after pyproject.toml, which makes warnings errors


def test_the_tests_of_a_gpu_take_float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU takes minutes for the small models in half precision."""
    monkeypatch.setattr(test_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(test_gpu, "check", lambda vae: None)
    vae, model = test_gpu.loaded("sd-v1")
    assert vae.dtype == model.dtype == torch.float32


def test_the_script_explains_its_calls() -> None:
    run = subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh"], capture_output=True, text=True)
    assert run.returncode == 2
    assert [line.split()[:2] for line in run.stderr.splitlines()] == [
        ["benchmarks/gpu.sh", call] for call in ("wheels", "first", "second")
    ]


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"no stage nonsense; the stages are environment, "):
        gpu.main("wan,nonsense")


def test_a_server_on_a_gpu_is_not_forked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch refuses CUDA in a process that was forked after diffusers was imported."""
    monkeypatch.setattr(forked, "start_process", lambda *arguments: "from the start")
    environment = {**os.environ, "VAE_DEVICE": "cuda:0"}
    assert forked.start(("-c", ""), tmp_path / "log", environment) == "from the start"


def test_a_run_needs_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert bench.commit() == "unknown"


def test_the_exact_result_is_computed_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(forward, "plain_call", lambda *_: lambda: allowed.append(torch.backends.cudnn.allow_tf32))
    forward.exact_result(build("taesd"), "decode", torch.zeros(1))
    assert allowed == [False]
    assert torch.backends.cudnn.allow_tf32
