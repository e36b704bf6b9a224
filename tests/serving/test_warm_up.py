"""Tests of the passes before the first request."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from torch import Tensor

from handlers import MODELS
from handlers.serving.layout import Layout
from handlers.serving.settings import WARM_UP, Settings
from handlers.serving.vae import warm_up as module
from handlers.serving.vae.vae import VAE
from handlers.serving.vae.warm_up import example_inputs, warm_up
from scripts.local_server import serve
from tests.support.checkpoints import build


class SmallImage(MODELS["sd-v1"]):
    usual_size = (64, 96)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Return the list of the passes. Each takes one second, and a smaller side is 32 pixels."""
    passes = []

    def record(task: str, run: Callable[..., Any], vae: VAE, inputs: Tensor) -> None:
        passes.append((task, tuple(inputs.shape)))
        run(vae, inputs)

    for task in ("decode", "encode"):
        run = getattr(VAE, task)
        monkeypatch.setattr(VAE, task, lambda vae, inputs, task=task, run=run: record(task, run, vae, inputs))
    monkeypatch.setattr(module, "SIDE", 32)
    monkeypatch.setattr(module, "perf_counter", itertools.count().__next__)
    return passes


DECODES = [("decode", (1, 4, 4, 4))] * 2 + [("decode", (1, 4, 8, 12))]
ENCODES = [("encode", (1, 3, 32, 32))] * 2 + [("encode", (1, 3, 64, 96))]


def test_a_pass_of_the_usual_size_runs_if_it_should_be_short(
    passes: list[tuple[str, tuple[int, ...]]], caplog: pytest.LogCaptureFixture
) -> None:
    list(warm_up(VAE(build("sd-v1"), SmallImage), 6))  # the usual size has six times the pixels
    assert passes == DECODES + ENCODES
    assert not caplog.records


def test_a_pass_that_should_take_longer_is_left_out(
    passes: list[tuple[str, tuple[int, ...]]], caplog: pytest.LogCaptureFixture
) -> None:
    list(warm_up(VAE(build("sd-v1"), SmallImage), 5.9))
    assert passes == DECODES[:2] + ENCODES[:2]
    assert "no warm-up of decode at 96x64 on cpu: it should take 6.0 s, and VAE_WARM_UP is 5.9" in caplog.text


def test_a_failing_pass_ends_the_warm_up_of_its_task_alone(
    passes: list[tuple[str, tuple[int, ...]]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = VAE(build("sd-v1"), SmallImage)
    monkeypatch.setattr(vae.model, "decode", None)
    list(warm_up(vae, 6))
    assert passes == DECODES[:1] + ENCODES
    assert "no warm-up of decode on cpu: TypeError: 'NoneType' object is not callable" in caplog.text


@pytest.mark.parametrize(
    ("layout", "latents", "pixels"),
    [
        (Layout("image", 16, 8, vae_ndim=5), (1, 16, 1, 4, 6), (1, 3, 32, 48)),
        (Layout("image", 16, 8, vae_ndim=5, pixel_channels=4), (1, 16, 1, 4, 6), (1, 4, 32, 48)),
        (Layout("video", 16, 8, (1, 5, 9), vae_ndim=5), (1, 16, 3, 4, 6), (1, 3, 9, 32, 48)),
        (Layout("video", 16, 8, (1, 5, 9), vae_ndim=5, upscale=2), (1, 16, 3, 2, 3), (1, 3, 9, 32, 48)),
        (Layout("video", 24, 16, (1, 5, 9, 13, 17, 18), vae_ndim=5, clip=5), (1, 24, 3, 2, 3), (1, 3, 5, 32, 48)),
    ],
    ids=["Qwen-Image", "layers", "Wan", "Wan of twice the size", "MiniMax-H3"],
)
def test_the_inputs_of_each_layout(layout: Layout, latents: tuple[int, ...], pixels: tuple[int, ...]) -> None:
    assert example_inputs(layout, "decode", 32, 48).shape == latents
    assert example_inputs(layout, "encode", 32, 48).shape == pixels


def test_a_gpu_is_warmed_up_by_default() -> None:
    assert Settings().warm_up_seconds("cuda") == WARM_UP
    assert Settings().warm_up_seconds("cpu") == 0
    assert Settings(warm_up=0).warm_up_seconds("cuda") == 0
    assert Settings(warm_up=9).warm_up_seconds("cpu") == 9


def test_a_service_is_warm_before_it_listens(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    command, log = ("--model", "sd-v1", "--weights", str(checkpoint("sd-v1"))), tmp_path / "log"
    with serve(*command, log=log, VAE_WARM_UP="1000", VAE_FAST="1") as url:
        first = log.read_text().split("Uvicorn running")[0]
        for task in ("decode", "encode"):
            assert f"warm-up of {task} at 512x512 on cpu took" in first
        assert "fast pass" not in first  # its check waits
        assert "vae_passes_total{" not in requests.get(f"{url}/metrics", timeout=60).text  # no request yet
