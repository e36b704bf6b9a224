"""Where weights come from, and the published architectures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from handlers import MODELS
from handlers.base import EndpointHandler
from handlers.serving.settings import Settings
from handlers.serving.vae import VAE


def bias_of(vae: VAE) -> torch.Tensor:
    return vae.model.decoder.conv_in.bias


def test_an_explicit_folder_comes_first(checkpoint: Callable[[str], Path]) -> None:
    vae = VAE.load(MODELS["sd-v1"], str(checkpoint("sdxl")), Settings(weights=str(checkpoint("sd-v1"))), "cpu")
    assert vae.config.scaling_factor == 0.18215


@pytest.mark.parametrize("place", [".", "vae"])
def test_then_the_mounted_repository(checkpoint: Callable[[str], Path], tmp_path: Path, place: str) -> None:
    shutil.copytree(checkpoint("flux"), tmp_path / place, dirs_exist_ok=True)
    vae = VAE.load(MODELS["flux"], str(tmp_path), Settings(), "cpu")
    assert vae.config.shift_factor == 0.1159


def test_then_the_checkpoint(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    class Custom(EndpointHandler):
        checkpoint = str(tmp_path)
        subfolder = "deep"
        vae_class = "AutoencoderKL"
        dtype = "float16"

    shutil.copytree(checkpoint("sdxl"), tmp_path / "deep")
    repository_without_vae = tmp_path / "repository"
    repository_without_vae.mkdir()
    (repository_without_vae / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert VAE.load(Custom, str(repository_without_vae), Settings(), "cpu").config.scaling_factor == 0.13025


def test_the_checkpoint_is_asked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((OSError, LocalEntryNotFoundError), match="madebyollin/sdxl-vae-fp16-fix"):
        VAE.load(MODELS["sdxl"], str(tmp_path), Settings(), "cpu")


def test_a_folder_without_a_vae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"VAE_WEIGHTS=.* holds no AutoencoderKL"):
        VAE.load(MODELS["sd-v1"], "", Settings(weights=str(tmp_path)), "cpu")


def test_pickled_weights_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copy(checkpoint("sd-v1") / "config.json", tmp_path)
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        VAE.load(MODELS["sd-v1"], "", Settings(weights=str(tmp_path)), "cpu")


def test_device_and_dtype(checkpoint: Callable[[str], Path]) -> None:
    weights = str(checkpoint("flux"))
    assert VAE.load(MODELS["flux"], "", Settings(weights=weights), "cpu").dtype == torch.float32
    vae = VAE.load(MODELS["flux"], "", Settings(weights=weights, dtype="bfloat16"), "cpu")
    assert vae.dtype == torch.bfloat16
    decoded, _ = vae.decode(torch.zeros(1, 16, 2, 2))
    assert decoded.dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["sd-v1", "sdxl", "flux"])
def test_published_image_architecture_with_random_weights(key: str, caplog: pytest.LogCaptureFixture) -> None:
    vae = VAE.load(MODELS[key], "", Settings(weights="random"), "cpu")
    assert "RANDOM" in caplog.text
    channels = {"sd-v1": 4, "sdxl": 4, "flux": 16}[key]
    assert vae.layout.latent_channels == channels
    decoded, _ = vae.decode(torch.zeros(1, channels, 32, 32))
    assert decoded.shape == (1, 3, 256, 256)
    assert decoded.isfinite().all()


def test_published_video_architecture_with_random_weights() -> None:
    vae = VAE.load(MODELS["hunyuan-video"], "", Settings(weights="random"), "cpu")
    decoded, _ = vae.decode(torch.zeros(1, 16, 3, 8, 8))
    assert decoded.shape == (1, 3, 9, 64, 64)


def test_random_weights_are_seeded() -> None:
    first, second = (VAE.load(MODELS["tiny"], "", Settings(weights="random"), "cpu") for _ in range(2))
    assert torch.equal(bias_of(first), bias_of(second))
