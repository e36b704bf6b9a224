"""Tests of the models' declarations, and of the model in this repository."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from rich.console import Console
from skimage import data
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from handlers import MODELS, EndpointHandler, get_model, get_models
from scripts import models
from scripts.local_server import ROOT
from tests.support.messages import send

TINY = ROOT / "models" / "tiny"


@pytest.fixture(scope="module")
def tiny() -> EndpointHandler:
    return get_model("tiny")("")


def test_an_unknown_key_is_an_error_that_lists_the_keys() -> None:
    with pytest.raises(
        ValueError, match=rf"no model 'fluks' \(did you mean flux\?\); the models are: {', '.join(MODELS)}"
    ):
        get_model("fluks")
    with pytest.raises(ValueError, match="there is no model 'zzz'; the models are: "):
        get_model("zzz")


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("Flux", "flux"), ("wan2.1", "wan-2.1"), ("sd_v1", "sd-v1"), ("qwen", "qwen-image"), ("ltx", "ltx-2")],
)
def test_an_unknown_key_suggests_the_nearest(key: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match=rf"there is no model '{key}' \(did you mean {suggestion}\?\)"):
        get_models(f"tiny,{key}")


def test_the_declaration_of_tiny_matches_its_config() -> None:
    config = json.loads((TINY / "config.json").read_text())
    published = MODELS["tiny"].published_config
    assert published == {name: config[name] for name in published}


def test_tiny_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8_000_000


@pytest.mark.slow
def test_tiny_reproduces_a_photograph_outside_its_training_set(tiny: EndpointHandler) -> None:
    photograph = data.astronaut()[:256, 100:356]
    latents = send(tiny.pipeline, Image.fromarray(photograph), do_scaling=True)
    assert latents.shape == (1, 8, 64, 64)
    image = Image.open(io.BytesIO(send(tiny.pipeline, latents, do_scaling=True)))
    assert peak_signal_noise_ratio(photograph, np.asarray(image)) >= 32


@pytest.mark.slow
def test_tiny_is_as_good_in_half_precision() -> None:
    """Use a small crop, because a processor without float16 instructions takes 200 times as long in float16."""
    crop = data.astronaut()[96:144, 200:248]
    photograph = torch.from_numpy(crop).permute(2, 0, 1)[None] / 127.5 - 1
    single, *others = (psnr(photograph, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
    assert single >= 32
    assert others == pytest.approx([single, single], abs=0.3)


@torch.inference_mode()
def psnr(photograph: Tensor, dtype: torch.dtype) -> float:
    """Return the PSNR of plain diffusers with tiny's weights, all in this dtype."""
    vae = AutoencoderKL.from_pretrained(TINY, torch_dtype=dtype)
    decoded = vae.decode(vae.encode(photograph.to(dtype)).latent_dist.mode()).sample
    return peak_signal_noise_ratio(photograph.numpy(), decoded.float().clamp(-1, 1).numpy(), data_range=2)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_tiny_keeps_a_flat_image_flat(tiny: EndpointHandler, value: int) -> None:
    latents = send(tiny.pipeline, Image.new("RGB", (128, 64), (value, value, value)))
    image = Image.open(io.BytesIO(send(tiny.pipeline, latents)))
    assert np.abs(np.asarray(image).astype(int) - value).max() < 16


def test_every_model_is_a_class_in_a_file_of_its_name() -> None:
    for key, model in MODELS.items():
        assert Path(model.__module__.replace(".", "/")).name == re.sub("[-.]", "_", key)
        assert issubclass(model, EndpointHandler)
        assert model.__doc__


@pytest.mark.parametrize(
    ("print_models", "width"), [(models.print_table, models.WIDE), (models.print_list, 80), (models.print_list, 120)]
)
def test_the_printed_models_can_be_read_at_any_width(
    print_models: Callable[[Console], None], width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    print_models(Console(width=width))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    for key, model in MODELS.items():
        assert any(line.startswith(f"{key} ") and models.latents(model) in line for line in lines)
        assert any(models.checkpoint(model) in line for line in lines)
        assert any(model.vae_class in line for line in lines)


def test_a_model_without_declarations_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "MODELS", {"bare": type("Bare", (EndpointHandler,), {})})
    for print_models in (models.print_table, models.print_list):
        print_models(Console(width=200))
        assert "[B, ?, H/8, W/8]" in capsys.readouterr().out


def test_the_range_of_comfyuis_latents() -> None:
    """Test against the latent formats of ComfyUI 0.33. Those without a scale hold normalized latents."""
    of = {
        value: {key for key in MODELS if MODELS[key].comfyui_latents == value} for value in ("raw", "normalized", None)
    }
    normalized = {"flux2", "flux2-small", "taef2", "ltx-video", "ltx-2", "ltx-2.3", "taeltx2", "taeltx2.3"}
    assert of["normalized"] == normalized | {"minimax-h3", "taeh3"}
    assert of[None] == {"taesd", "taesdxl", "taesd3", "taef1", "taehv", "taehv1.5", "taecvx", "taew2.1", "taew2.2"}
