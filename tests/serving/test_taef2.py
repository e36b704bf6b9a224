"""Tests of FLUX.2's tiny autoencoder against results of the published code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from handlers import MODELS
from handlers.model import WrongWeights
from handlers.serving.settings import Settings
from handlers.serving.vae.taef2 import TinyFlux2Autoencoder
from handlers.serving.vae.vae import VAE
from tests.support.tiny_videos import seeded_values, seeded_weights

DECODED = (-1.30571, 0.49589, [-1.19409, -1.26927, -0.77382, -1.08207, -0.77112])
ENCODED = (-0.0195, 0.39364, [0.28423, 0.09847, -0.26179, 0.01214, -0.30436])
"""Mean, deviation and five values of the results for seeded weights.

They come from the published code, https://github.com/madebyollin/taesd at commit 5cccb12, with the same weights under
its own names.
"""


def network() -> TinyFlux2Autoencoder:
    model = TinyFlux2Autoencoder().eval().requires_grad_(False)
    model.load_state_dict(seeded_weights(model.state_dict()))
    return model


@pytest.mark.parametrize(("task", "expected"), [("decode", DECODED), ("encode", ENCODED)])
def test_results_equal_the_published_code(task: str, expected: tuple[float, float, list[float]]) -> None:
    """Test a batch, whose images have statistics of their own, with sizes that are no power of 2."""
    inputs = seeded_values(2, 32, 5, 3) if task == "decode" else seeded_values(2, 3, 40, 24).clamp(-1, 1)
    (result,) = getattr(network(), task)(inputs)
    flat = result.flatten()
    samples = flat[torch.linspace(0, len(flat) - 1, 5).long()].tolist()
    mean, deviation, values = expected
    assert [flat.mean().item(), flat.std().item(), *samples] == pytest.approx([mean, deviation, *values], abs=2e-5)


@pytest.mark.slow
def test_weights_are_a_file_as_it_is_published(tmp_path: Path) -> None:
    file = tmp_path / "taef2.safetensors"
    save_file({name: value.half() for name, value in network().state_dict().items()}, file)
    vae = VAE.load(MODELS["taef2"], "", Settings(weights=str(file), fast=False), "cpu")
    latents = seeded_values(1, 32, 2, 3)
    torch.testing.assert_close(vae.decode(latents)[0], network().decode(latents)[0], atol=0.02, rtol=0.02)
    with pytest.raises(WrongWeights, match=r"taef2\.safetensors has the weights of another network than Taew21"):
        VAE.load(MODELS["taew2.1"], "", Settings(weights=str(file)), "cpu")
