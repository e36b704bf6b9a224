import pytest
import torch
from torch.nn.functional import pixel_shuffle

from handlers.serving.latents import Scaling, is_packed, to_batch, unpack
from handlers.serving.layout import Layout
from handlers.serving.request import Parameters

IMAGE = Layout("image", latent_channels=16, vae_scale_factor=8)
VIDEO = Layout("video", latent_channels=16, vae_scale_factor=8)


def test_unpack_shuffles_pixels() -> None:
    packed = torch.randn(2, 4 * 6, 64)
    assert torch.equal(unpack(packed, 4, 6), pixel_shuffle(packed.transpose(1, 2).unflatten(2, (4, 6)), 2))


@pytest.mark.parametrize(
    ("shape", "height", "width", "expected"),
    [
        ((1, 4096, 64), 1024, 1024, True),
        ((1, 4096, 64), 1030, 1029, True),  # pipelines round sizes down
        ((16, 4096, 64), 1024, 1024, True),  # a batch as large as the channels are many
        ((1, 4096, 64), 1024, 512, False),
        ((1, 4096, 64), None, None, False),
        ((1, 4096, 64), "1024", "1024.5", False),
        ((1, 4096, 64), -1024, -1024, False),
        ((16, 64, 64), 512, 512, False),  # unbatched [C, H, W], as wide as packed features are many
        ((1, 16, 64, 64), 512, 512, False),
    ],
)
def test_packed_is_told_by_the_size_that_came_with_it(
    shape: tuple[int, ...], height: int | None, width: int | None, expected: bool
) -> None:
    assert is_packed(shape, Parameters(height=height, width=width), IMAGE) is expected


def test_unbatched_as_wide_as_packed_features() -> None:
    latents = torch.randn(16, 64, 64)
    assert torch.equal(to_batch(latents, Parameters(height=512, width=512), IMAGE), latents[None])


def test_packed_latents_of_a_video_model_are_one_frame() -> None:
    assert to_batch(torch.randn(1, 16, 64), Parameters(height=64, width=64), VIDEO).shape == (1, 16, 1, 8, 8)


@pytest.mark.parametrize("layout", [IMAGE, VIDEO])
def test_mean_and_std_of_the_config(layout: Layout) -> None:
    mean, std = torch.arange(16.0), torch.arange(1.0, 17.0)
    config = {"latents_mean": mean.tolist(), "latents_std": std.tolist(), "scaling_factor": 2.0}
    scaling = Scaling.of(Parameters(do_scaling=True), config, layout)
    latents = torch.randn((1, 16, *(3,) * (layout.ndim - 2)))
    channels = layout.broadcast(16)
    expected = latents * std.view(channels) / 2 + mean.view(channels)  # as diffusers' SDXL pipeline
    raw = scaling.unscale(latents, torch.float32)
    torch.testing.assert_close(raw, expected)
    torch.testing.assert_close(scaling.scale(raw), latents)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_mean_and_std_go_to_the_latents_device(device: str) -> None:
    config = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    scaling = Scaling.of(Parameters(do_scaling=True), config, IMAGE)
    latents = torch.empty(1, 16, 2, 2, device=device)
    assert scaling.scale(latents).device == scaling.unscale(latents, torch.float32).device == latents.device


def test_shift_without_scaling() -> None:
    scaling = Scaling.of(Parameters(shift_factor=0.5), {"scaling_factor": 3}, IMAGE)
    latents = torch.zeros(1, 16, 2, 2)
    assert (scaling.unscale(latents, torch.float32) == 0.5).all()
    assert (scaling.scale(latents) == -0.5).all()


def test_scaling_is_computed_in_the_wider_dtype() -> None:
    latents = torch.randn(1, 16, 4, 4)
    expected = (latents / 0.3611 + 0.1159).bfloat16()
    assert torch.equal(Scaling(0.3611, 0.1159).unscale(latents, torch.bfloat16), expected)
    expected = (latents.half().float() / 0.3611 + 0.1159).bfloat16()
    assert torch.equal(Scaling(0.3611, 0.1159).unscale(latents.half(), torch.bfloat16), expected)
