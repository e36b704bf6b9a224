import pytest
import torch
from torch.nn.functional import pixel_shuffle

from handlers import MODELS
from handlers.serving.errors import RequestError
from handlers.serving.layout import Layout
from handlers.serving.media.latents import LatentsLayouts, add_noise
from handlers.serving.media.request import Parameters

IMAGE = LatentsLayouts(Layout("image", 16, 8), MODELS["flux"])
VIDEO = LatentsLayouts(Layout("video", 16, 8, (1, 5, 9), 5), MODELS["hunyuan-video"])
IMAGE_OF_VIDEO_VAE = LatentsLayouts(Layout("image", 16, 8, vae_ndim=5), MODELS["qwen-image"])
FRAMES_FIRST = LatentsLayouts(Layout("video", 16, 8, (1, 8, 9), 5), MODELS["cogvideox"])
ONE_BY_ONE = LatentsLayouts(Layout("video", 128, 32, (1, 9, 17), 5), MODELS["ltx-video"])
PATCHIFIED = LatentsLayouts(Layout("image", 32, 8), MODELS["flux2"])


def read(layouts: LatentsLayouts, latents: torch.Tensor, **parameters: object) -> torch.Tensor:
    return layouts.to_own(latents, Parameters.parse(parameters))[0]


def test_packed_latents_are_shuffled_pixels() -> None:
    packed = torch.randn(2, 4 * 6, 64)
    expected = pixel_shuffle(packed.transpose(1, 2).unflatten(2, (4, 6)), 2)
    assert torch.equal(read(IMAGE, packed, height=64, width=96), expected)
    assert torch.equal(read(IMAGE_OF_VIDEO_VAE, packed, height=64, width=96), expected.unsqueeze(2))


@pytest.mark.parametrize(
    ("shape", "height", "width", "packed"),
    [
        ((1, 4096, 64), 1024, 1024, True),
        ((1, 4096, 64), 1030, 1029, True),  # pipelines round sizes down
        ((16, 4096, 64), 1024, 1024, True),  # a batch size equal to the number of channels
        ((1, 4096, 64), 1024, 512, False),
        ((1, 4096, 64), None, None, False),
        ((1, 4096, 64), "1024", "1024.5", False),
        ((1, 4096, 64), -1024, -1024, False),
        ((16, 64, 64), 512, 512, False),  # unbatched [C, H, W], as wide as packed features
        ((1, 16, 64, 64), 512, 512, False),
    ],
)
def test_height_and_width_identify_packed_latents(
    shape: tuple[int, ...], height: int | None, width: int | None, packed: bool
) -> None:
    assert (IMAGE.matches(shape, Parameters(height=height, width=width)) == ["packed"]) is packed


def test_unbatched_as_wide_as_packed_features() -> None:
    latents = torch.randn(16, 64, 64)
    assert torch.equal(read(IMAGE, latents, height=512, width=512), latents[None])


def test_packed_video_latents_are_one_frame_without_num_frames() -> None:
    assert read(VIDEO, torch.randn(1, 16, 64), height=64, width=64).shape == (1, 16, 1, 8, 8)
    for num_frames in (9, 12):  # a pipeline rounds down to 9
        latents = read(VIDEO, torch.randn(1, 48, 64), height=64, width=64, num_frames=num_frames)
        assert latents.shape == (1, 16, 3, 8, 8)
    with pytest.raises(RequestError, match=r"with `height` and `width` \(got height=64, width=64, num_frames=None\)"):
        read(VIDEO, torch.randn(1, 48, 64), height=64, width=64)


def test_num_frames_is_ignored_for_an_image() -> None:
    assert read(IMAGE, torch.randn(1, 16, 64), height=64, width=64, num_frames=9).shape == (1, 16, 8, 8)


def test_video_tokens_are_in_frame_order() -> None:
    latents = torch.randn(2, 128, 3, 4, 6)
    packed = latents.flatten(2).transpose(1, 2)
    assert torch.equal(read(ONE_BY_ONE, packed, height=128, width=192, num_frames=17), latents)


@pytest.mark.parametrize("batch", [1, 2])
def test_frames_first_and_channels_last(batch: int) -> None:
    latents = torch.randn(batch, 16, 3, 4, 6)
    assert torch.equal(read(FRAMES_FIRST, latents.movedim(1, 2)), latents)
    assert torch.equal(read(FRAMES_FIRST, latents), latents)
    assert torch.equal(read(VIDEO, latents.movedim(1, -1)), latents)
    assert torch.equal(read(FRAMES_FIRST, latents[0].movedim(0, 1)), latents[:1])
    image = latents[:, :, 0]
    assert torch.equal(read(IMAGE, image.movedim(1, -1).unsqueeze(1)), image)


def test_a_batched_layout_has_priority() -> None:
    """Test images 128 pixels wide, whose width could be the channels of a channels-last layout."""
    latents = torch.randn(1, 16, 24, 16)
    assert torch.equal(read(IMAGE, latents), latents)


def test_patches_as_channels() -> None:
    latents = torch.randn(2, 128, 4, 6)
    assert torch.equal(read(PATCHIFIED, latents), pixel_shuffle(latents, 2))


def test_an_ambiguous_layout_is_refused_unless_it_is_named() -> None:
    latents = torch.randn(1, 16, 16, 4, 6)
    with pytest.raises(RequestError, match=r"may be BCFHW, \[B, 16, F, .*\] or BFCHW, .*; say which with `latents_lay"):
        read(FRAMES_FIRST, latents, num_frames=61)
    assert torch.equal(read(FRAMES_FIRST, latents, latents_layout="BCFHW", num_frames=61), latents)
    assert torch.equal(read(FRAMES_FIRST, latents, latents_layout="BFCHW", num_frames=61), latents.movedim(1, 2))


def test_as_many_images_as_channels_are_no_video_without_a_word() -> None:
    """[16, 16, H, W] is one video of 16 frames, or a batch of 16 images."""
    latents = torch.randn(16, 16, 8, 8)
    with pytest.raises(RequestError, match="latents_layout=BCFHW for the video, or images with a dimension of one"):
        read(VIDEO, latents)
    for settled in ({"latents_layout": "BCFHW"}, {"num_frames": 61}):
        assert torch.equal(read(VIDEO, latents, **settled), latents[None])
    assert read(VIDEO, latents.unsqueeze(2)).shape == (16, 16, 1, 8, 8)
    assert read(VIDEO, latents[:, :15]).shape == (1, 16, 15, 8, 8)
    assert torch.equal(read(IMAGE, latents), latents)


def test_a_layout_that_the_model_does_not_have() -> None:
    with pytest.raises(RequestError, match="`latents_layout`: this model has no 'BFHWC', only BCHW, packed"):
        read(PATCHIFIED, torch.randn(1, 32, 4, 6), latents_layout="BFHWC")
    with pytest.raises(RequestError, match="this model has no 'BFHWC'"):
        PATCHIFIED.check_layout("BFHWC", (1, 32, 4, 6))


def test_num_frames_drops_padding() -> None:
    latents = torch.randn(1, 22, 16, 4, 6)
    assert torch.equal(read(FRAMES_FIRST, latents, num_frames=81), latents[:, 1:].movedim(1, 2))
    with pytest.raises(RequestError, match="22 latent frames of this model may begin with 1 of padding; send `num_fra"):
        read(FRAMES_FIRST, latents)
    with pytest.raises(RequestError, match="`num_frames`: 49 frames are 13 latent frames, but the tensor has 22"):
        read(FRAMES_FIRST, latents, num_frames=49)


@pytest.mark.parametrize("layouts", [IMAGE, VIDEO, IMAGE_OF_VIDEO_VAE, FRAMES_FIRST, ONE_BY_ONE, PATCHIFIED])
def test_every_layout_makes_a_round_trip(layouts: LatentsLayouts) -> None:
    layout = layouts.layout
    frames = {4: (), 5: (3,) if layout.kind == "video" else (1,)}[layout.ndim]
    latents = torch.randn(2, layout.latent_channels, *frames, 4, 6)
    side = layout.vae_scale_factor
    sent = {"height": 4 * side, "width": 6 * side}
    if layout.kind == "video":
        sent["num_frames"] = 2 * layout.frame_factor + 1
    for name in layouts.names:
        written = layouts.from_own(latents, name)
        assert torch.equal(read(layouts, written, latents_layout=name, **sent), latents), name
    assert torch.equal(layouts.from_own(latents, None), latents)


def test_patches_require_divisible_sizes() -> None:
    with pytest.raises(RequestError, match="packed needs a height and a width that are multiples of 16"):
        IMAGE.check_layout("packed", (1, 16, 5, 6))


def test_noise_depends_on_its_scale_and_seed() -> None:
    latents = torch.randn(1, 8, 3, 4, 6)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    mixed = add_noise(latents, Parameters(decode_timestep=0.05, decode_noise_scale=0.25, seed=3))
    assert torch.equal(mixed, 0.75 * latents + 0.25 * noise)
    assert torch.equal(add_noise(latents, Parameters(decode_timestep=0.05, seed=3)), 0.95 * latents + 0.05 * noise)
    assert torch.equal(add_noise(latents, Parameters()), latents)
