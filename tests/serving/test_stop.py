"""Tests that an abandoned pass stops at once in every mode of every model, and leaves nothing behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from handlers import MODELS
from handlers.serving.vae import low_memory
from handlers.serving.vae import vae as vae_module
from handlers.serving.vae.autoencoder import has_frames
from handlers.serving.vae.fast.forward import FastPass
from handlers.serving.vae.memory import Mode
from handlers.serving.vae.stop import PassStopped, stoppable
from handlers.serving.vae.vae import VAE
from handlers.serving.vae.weights import find_class
from tests.support.checkpoints import SMALL, build, model_for, small_tiles
from tests.support.small_service import SERVED

CONVOLUTIONS = {torch.conv2d, torch.conv3d, torch.conv1d, torch.nn.functional.linear}
CLASSES = list({SMALL[key][0]: key for key in SERVED}.values())
"""A model of each class."""
UPSAMPLING = 7
"""Convolutions between two polls: one upsampling of the fast pass consists of up to eight small convolutions."""


class Convolutions(TorchFunctionMode):
    """A counter of convolutions. The client disconnects after the one with the number `last`."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.count, self.last = 0, last

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in CONVOLUTIONS
        return function(*args, **(kwargs or {}))

    def is_unwanted(self) -> bool:
        return self.last is not None and self.count >= self.last


@cache
def small(key: str) -> VAE:
    vae_class, config = SMALL[key]
    torch.manual_seed(0)
    vae = VAE(find_class(vae_class).from_config(config), model_for(key))
    small_tiles(vae.model, vae.layout.vae_scale_factor)
    return vae


def inputs(vae: VAE, task: str, batch: int = 1, rows: int = 2) -> Tensor:
    """Return an input of this many rows of latents. A video has three latent frames to decode, and two encoded ones."""
    generator, video = torch.Generator().manual_seed(0), vae.layout.kind == "video"
    if task == "decode":
        frames = (3,) if video else (1,) if has_frames(vae.model) and vae.layout.ndim == 5 else ()
        return torch.randn(batch, vae.layout.latent_channels, *frames, rows, 2, generator=generator)
    frames, scale = vae.layout.frame_counts[1:2] if video else (), vae.layout.vae_scale_factor
    return torch.rand(batch, vae.layout.pixel_channels, *frames, rows * scale, 2 * scale, generator=generator) * 2 - 1


def run(vae: VAE, task: str, tensor: Tensor, watch: Convolutions) -> tuple[Tensor, Mode]:
    with watch, stoppable(watch.is_unwanted):
        return getattr(vae, task)(tensor)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mode], None]:
    """Force passes into one mode, with rows in small chunks."""
    monkeypatch.setattr(low_memory, "GROUP_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(low_memory, "MIN_ROWS", 8)
    return lambda mode: monkeypatch.setattr(vae_module, "choose_modes", lambda *_: [mode])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["decode", "encode"])
@pytest.mark.parametrize("key", CLASSES)
def test_a_pass_stops_within_an_operation_and_the_next_succeeds(
    key: str, task: str, force: Callable[[Mode], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = small(key)
    for mode in modes(vae, task, monkeypatch):
        force(mode)
        tensor = inputs(vae, task, batch=2 if mode is Mode.SLICED else 1, rows=5 if mode is Mode.TILED else 2)
        whole = Convolutions()
        expected, run_in = run(vae, task, tensor, whole)
        assert run_in is mode
        for last in (1, whole.count // 2):
            watch = Convolutions(last)
            with pytest.raises(PassStopped):
                run(vae, task, tensor, watch)
            assert watch.count - last <= (UPSAMPLING if mode is Mode.FAST else 1), (mode, last, whole.count)
            assert not any("forward" in vars(module) for module in vae.model.modules())
        result, _ = run(vae, task, tensor, Convolutions())
        assert torch.equal(result, expected), mode


def modes(vae: VAE, task: str, monkeypatch: pytest.MonkeyPatch) -> list[Mode]:
    """Return all modes of the model, and the fast pass without its check."""
    offered = {mode for batch in (1, 2) for mode in vae._offered(task, inputs(vae, task, batch).shape, False)}
    if fast := vae.memory.reduces:
        monkeypatch.setattr(vae.fast, "_used", {task: FastPass(vae.model)})
    return [mode for mode in Mode if mode in offered or (mode is Mode.FAST and fast)]


def test_values_equal_diffusers() -> None:
    vae = VAE(build("sd-v1"), MODELS["sd-v1"])
    latents = inputs(vae, "decode")
    with pytest.raises(PassStopped):
        run(vae, "decode", latents, Convolutions(5))
    result, mode = run(vae, "decode", latents, Convolutions())
    with torch.no_grad():
        expected = build("sd-v1").decode(latents, return_dict=False)[0]
    assert mode is Mode.FULL
    assert torch.equal(result, expected)


def test_a_stop_is_not_a_failure_of_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that no other mode and no float32 pass is tried, and that the weights keep their dtype."""
    vae = VAE(build("sd-v1").bfloat16(), MODELS["sd-v1"])
    passes: list[Mode] = []
    begin = vae._pass
    monkeypatch.setattr(vae, "_pass", lambda task, mode: passes.append(mode) or begin(task, mode))
    with pytest.raises(PassStopped):
        run(vae, "decode", inputs(vae, "decode"), Convolutions(3))
    assert passes == [Mode.FULL]
    assert {parameter.dtype for parameter in vae.model.parameters()} == {torch.bfloat16}


def test_a_repetition_in_float32_stops_and_restores_the_dtype() -> None:
    vae = VAE(build("sd-v1").half(), MODELS["sd-v1"])
    vae.model.decoder.conv_in.weight.fill_(30_000.0)  # the pass overflows
    latents = torch.rand(1, 4, 5, 5) + 1
    whole = Convolutions()
    expected, _ = run(vae, "decode", latents, whole)
    watch = Convolutions(whole.count - 5)
    with pytest.raises(PassStopped):
        run(vae, "decode", latents, watch)
    assert watch.count == watch.last
    assert {parameter.dtype for parameter in vae.model.parameters()} == {torch.float16}
    result, _ = run(vae, "decode", latents, Convolutions())
    assert torch.equal(result, expected)


@pytest.mark.slow
def test_tensors_are_freed_while_the_error_propagates() -> None:
    """Test the count of tensors, because the heap counts memory after the error."""
    vae = small("sd-v1")
    latents = inputs(vae, "decode")

    def tensors() -> int:
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    before = tensors()
    with pytest.raises(PassStopped) as stopped:
        run(vae, "decode", latents, Convolutions(10))
    assert stopped.value.__context__ is None
    assert tensors() <= before + 1  # the traceback of the error has at most its own tensor
