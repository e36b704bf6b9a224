from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from handlers import MODELS
from handlers.serving.errors import RequestError
from handlers.serving.media.normalization import Normalization, Scaling
from handlers.serving.media.request import Parameters

MEAN, STD = torch.arange(16.0), torch.arange(1.0, 17.0)


def normalization(key: str, buffers: dict[str, Tensor] | None = None, **config: object) -> Normalization:
    model = SimpleNamespace(config=config, named_buffers=lambda recurse: (buffers or {}).items())
    return Normalization.read(model, MODELS[key])


def scaling(
    normalization: Normalization, task: str = "decode", layout: str | None = None, **parameters: object
) -> Scaling:
    return normalization.scaling(Parameters.parse(parameters), task, layout)


@pytest.mark.parametrize("frames", [(), (3,)])
def test_mean_and_deviation_of_the_config(frames: tuple[int, ...]) -> None:
    config = {"latents_mean": MEAN.tolist(), "latents_std": STD.tolist(), "scaling_factor": 2.0}
    own = scaling(normalization("sdxl", **config), do_scaling=True)
    latents = torch.randn((1, 16, *frames, 3, 5))
    channels = (1, 16, *[1] * (latents.ndim - 2))
    raw = own.unscale(latents, torch.float32)
    # The SDXL pipeline of diffusers computes the same.
    assert torch.equal(raw, latents * STD.view(channels) / 2 + MEAN.view(channels))
    torch.testing.assert_close(own.scale(raw), latents)


def test_buffers_override_the_config() -> None:
    buffers = {"latents_mean": MEAN, "latents_std": STD}
    own = scaling(normalization("ltx-video", buffers, scaling_factor=1.0, latents_mean=None), do_scaling=True)
    assert torch.equal(own.unscale(torch.ones(1, 16, 1, 1, 1), torch.float32).flatten(), STD + MEAN)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_mean_and_deviation_are_on_the_device_of_the_latents(device: str) -> None:
    own = scaling(normalization("wan-2.1", latents_mean=[0.0] * 16, latents_std=[1.0] * 16), do_scaling=True)
    latents = torch.empty(1, 16, 1, 2, 2, device=device)
    assert own.scale(latents).device == own.unscale(latents, torch.float32).device == latents.device


def test_shift_without_scaling() -> None:
    sent = scaling(normalization("flux", scaling_factor=3.0), shift_factor=0.5)
    latents = torch.zeros(1, 16, 2, 2)
    assert (sent.unscale(latents, torch.float32) == 0.5).all()
    assert (sent.scale(latents) == -0.5).all()


def test_a_factor_of_the_request_replaces_the_configs() -> None:
    config = {"latents_mean": MEAN.tolist(), "latents_std": STD.tolist(), "scaling_factor": 0.5}
    own = normalization("playground-v2.5", **config)
    assert scaling(own, scaling_factor=0.5).factor == scaling(own, do_scaling=True).factor == 0.5
    with pytest.raises(RequestError, match="`shift_factor`: this VAE has a mean for each channel"):
        scaling(own, scaling_factor=0.5, shift_factor=0.1)


def test_a_factor_that_the_pipeline_ignores() -> None:
    config = {"latents_mean": MEAN.tolist(), "latents_std": STD.tolist(), "scaling_factor": 0.18215}
    own = normalization("glm-image", **config)
    for parameters in ({"do_scaling": True}, {"scaling_factor": 0.18215}, {"scaling_factor": 1.0}):
        assert scaling(own, **parameters).factor == 1.0
    with pytest.raises(RequestError, match="`scaling_factor`: this VAE's latents have none"):
        scaling(own, scaling_factor=0.5)


def test_latents_that_may_be_raw_need_a_parameter() -> None:
    own = normalization("ltx-2", {"latents_mean": MEAN, "latents_std": STD}, scaling_factor=1.0)
    for parameters in ({"do_scaling": True}, {"scaling_factor": 1.0}):
        with pytest.raises(RequestError, match=r"pipelines give BCFHW .*do_scaling=false .*normalized=true"):
            scaling(own, layout="BCFHW", **parameters)
        assert scaling(own, layout="BCFHW", normalized=False, **parameters) == Scaling()
    assert scaling(own, layout="BCFHW") == Scaling()
    normalized = scaling(own, layout="BCFHW", normalized=True, do_scaling=True)
    assert torch.equal(normalized.shift.flatten(), MEAN)
    assert torch.equal(scaling(own, layout="packed", do_scaling=True).shift, normalized.shift)
    assert torch.equal(scaling(own, "encode", "BCFHW", do_scaling=True).shift, normalized.shift)


def test_a_pipeline_without_the_shift() -> None:
    own = normalization("flux", scaling_factor=0.3611, shift_factor=0.1159)
    assert scaling(own, layout="packed", do_scaling=True) == Scaling(0.3611, 0.1159)
    assert scaling(own, layout="BFHWC", do_scaling=True) == Scaling(0.3611, 0.0)


def test_statistics_of_patches() -> None:
    mean, std = torch.arange(8.0).view(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
    raw = Scaling(1.0, mean, std).unscale(torch.zeros(1, 2, 4, 6), torch.float32)
    assert torch.equal(raw[0, 1, :2, :2], mean[0, 1])
    assert torch.equal(raw[0, 1, 2:, 4:], mean[0, 1])
    with pytest.raises(RequestError, match="so their height and width must be multiples of 2"):
        Scaling(1.0, mean, std).unscale(torch.zeros(1, 2, 5, 6), torch.float32)


def test_scaling_is_computed_in_the_wider_dtype() -> None:
    latents = torch.randn(1, 16, 4, 4)
    expected = (latents / 0.3611 + 0.1159).bfloat16()
    assert torch.equal(Scaling(0.3611, 0.1159).unscale(latents, torch.bfloat16), expected)
    expected = (latents.half().float() / 0.3611 + 0.1159).bfloat16()
    assert torch.equal(Scaling(0.3611, 0.1159).unscale(latents.half(), torch.bfloat16), expected)
