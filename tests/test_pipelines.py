"""Tests that each model gives over HTTP the results of its own pipeline in diffusers."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import av
import diffusers
import numpy as np
import pytest
import requests
import torch
import torch.nn.functional as F
from diffusers.utils.remote_utils import remote_decode
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from handlers.model import Model
from handlers.serving.media.output import write_mp4
from handlers.serving.vae.autoencoder import DecodeOptions, PixelRange, decode_at_once, encode_at_once, has_frames
from handlers.serving.vae.blocks import is_known
from handlers.serving.vae.vae import VAE
from remote_vae import RemoteVAE
from tests.support import pipelines
from tests.support.checkpoints import SMALL, build, model_for, small_tiles
from tests.support.pipelines import FIRST_FRAME, PIPELINES, Unavailable
from tests.support.small_service import SERVED, Service, as_tensor
from tests.support.values import TOLERANCE

NEWEST = pytest.mark.skipif("minimax-h3" not in SERVED, reason="the installed diffusers has no MiniMax-H3")
DECODERS = [(key, pipeline) for key in SERVED for pipeline in PIPELINES[key][0]]
ENCODERS = [(key, pipeline) for key in SERVED for pipeline in PIPELINES[key][1]]
NO_LAYERS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "invert_scale_latents")
NETWORKS = list(
    {
        str([SMALL[key][0], {name: value for name, value in SMALL[key][1].items() if name not in NO_LAYERS}]): key
        for key in reversed(SERVED)
    }.values()
)
"""The first model of each network. The others differ in the factors of their latents alone."""
SEED = 7
NOISE = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
DENORMALIZED = ("LTX2Pipeline", "Flux2KleinPipeline")
"""Pipelines that return raw latents."""
LAYOUTS = {
    **dict.fromkeys(("Flux2Pipeline", "Flux2KleinPipeline"), "patchified"),
    **dict.fromkeys(("LTXConditionPipeline", "LTXImageToVideoPipeline"), "packed"),
    **dict.fromkeys(("CogVideoXVideoToVideoPipeline", "CogVideoXImageToVideoPipeline"), "BFCHW"),
    **dict.fromkeys(("Kandinsky5I2IPipeline", "Kandinsky5I2VPipeline"), "BFHWC"),
}
"""Layouts of latents that pipelines encode to, if the VAE's own differs."""
MISSING = {
    "0.37": {
        "ErnieImagePipeline",
        "HunyuanVideo15Pipeline",  # with the transformers of the toolkit's image
        "HunyuanVideo15ImageToVideoPipeline",
        "SanaVideoPipeline",  # with this VAE
        "SanaImageToVideoPipeline",
    }
}
"""Pipelines that a version of diffusers does not have."""


@pytest.fixture
def mode(service: Service) -> Iterator[Callable[[str], None]]:
    """Return a function that forces all requests of a test into one mode."""

    def force(name: str) -> None:
        requests.post(f"{service.url}/mode/{name}", timeout=5).raise_for_status()

    yield force
    force("auto")


def latent_frames(model: type[Model], few: int = 3) -> int:
    """Return a few latent frames: of MiniMax-H3, a clip and its overlap."""
    return model.clip + 2 if model.clip else few


def some_latents(
    key: str, batch: int = 1, rows: int = 4, columns: int = 2, frames: int | None = None, seed: int = 0
) -> Tensor:
    """Return latents as a pipeline unpacks them, [B, C, h, w] or [B, C, F, h, w], in the range of its transformer."""
    model = model_for(key)
    time = (frames or latent_frames(model),) if model.kind == "video" else ()
    shape = (batch, model.latent_channels, *time, rows, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_pixels(model: type[Model], frames: int, batch: int = 1, rows: int = 2, columns: int = 4) -> Tensor:
    time = (frames,) if model.kind == "video" else ()
    sides = rows * model.vae_scale_factor, columns * model.vae_scale_factor
    return torch.rand((batch, model.pixel_channels, *time, *sides), generator=torch.Generator().manual_seed(0)) * 2 - 1


def available(pipeline: str, call: Callable[..., Any], *args: Any, **parameters: Any) -> Any:
    """Return the result of a pipeline's function. Skip the test if this diffusers is known not to have the pipeline."""
    try:
        return call(pipeline, *args, **parameters)
    except Unavailable:
        missing = MISSING.get(diffusers.__version__.rsplit(".", 1)[0], set())
        assert pipeline in missing, f"{pipeline} should be there"
        pytest.skip(f"diffusers {diffusers.__version__} has no {pipeline} for it")


def sent_along(key: str, pipeline: str, latents: Tensor) -> dict[str, Any]:
    """Return the parameters that a client sends with a pipeline's latents."""
    model = model_for(key)
    rows, columns = latents.shape[-2:]
    sent: dict[str, Any] = {
        "height": rows * model.vae_scale_factor,
        "width": columns * model.vae_scale_factor,
        "do_scaling": pipeline not in DENORMALIZED,
        "output_type": "pt",
    }
    if model.kind == "video":
        sent["num_frames"] = model.decoded_frames(latents.shape[2])
    if model.raw_layouts:
        sent["normalized"] = pipeline not in DENORMALIZED
    return sent


def read_factors(key: str) -> dict[str, float]:
    """Return the factors in the config of the small checkpoint."""
    config = SMALL[key][1]
    return {name: config[name] for name in ("scaling_factor", "shift_factor") if name in config}


def as_decoded(result: pipelines.PipelineResult, model: type[Model]) -> Tensor:
    """Return the VAE's output in the pipeline, without the single frame of an image and without a video's batch
    dimension.
    """
    if model.kind == "image":
        return result.decoded[:, :, 0] if result.decoded.ndim == 5 else result.decoded
    return result.decoded if result.decoded.ndim == 5 else result.decoded.movedim(0, 1)[None]


def by_itself(vae: Any, raw: Tensor) -> Tensor:
    """Return the output of the VAE for each item's latents, called directly."""
    image_as_video = raw.ndim == 4 and has_frames(vae)
    with torch.no_grad():
        decoded = decode_at_once(vae, raw.unsqueeze(2) if image_as_video else raw, DecodeOptions())
    if vae.config.get("out_channels") == 12 and not vae.config.get("patch_size"):  # wan-2.1-2x, as its card has it
        decoded = F.pixel_shuffle(decoded.movedim(2, 1), 2).movedim(1, 2)
    return decoded[:, :, 0] if image_as_video else decoded


def assert_close(result: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected, atol=tolerance * max(1.0, expected.abs().max().item()), rtol=0)


def assert_same_pixels(pixels: np.ndarray, expected: np.ndarray, decoded: Tensor) -> None:
    """Compare uint8 pixels. They may differ by 1 where the decoder's value is at a rounding boundary."""
    if decoded.ndim == 5:
        decoded = decoded[0].movedim(1, 0)
    exact = (decoded.movedim(1, -1) / 2 + 0.5).clamp(0, 1).numpy() * 255
    on_edge = np.abs(exact % 1 - 0.5) < 0.01
    assert pixels.shape == expected.shape
    assert np.array_equal(pixels[~on_edge], expected[~on_edge])
    assert np.abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("key", "pipeline"), DECODERS)
def test_decoding_equals_the_pipeline(service: Service, key: str, pipeline: str) -> None:
    model, latents = model_for(key), some_latents(key)
    conditions = NOISE if service.model(key).config.get("timestep_conditioning") else {}
    generator = torch.Generator().manual_seed(SEED)
    result = available(pipeline, pipelines.decode, service.model(key), latents, generator=generator, **conditions)
    sent = {**sent_along(key, pipeline, latents), **conditions, "seed": SEED}
    decoded = service.tensor(key, result.latent, "decode", **sent)
    if pipeline == "ErnieImagePipeline":  # its own epsilon is not the VAE's
        assert_close(decoded, as_decoded(result, model), 1e-3)
        return
    assert_close(decoded, as_decoded(result, model))
    pixels = service.tensor(key, result.latent, "decode", **sent, partial_postprocess=True).numpy()
    assert_same_pixels(pixels, result.pixels[0] if model.kind == "video" else result.pixels, decoded)


@pytest.mark.parametrize(("key", "pipeline"), [(key, name) for key, name in DECODERS if read_factors(key)])
def test_explicit_factors_equal_the_pipeline(service: Service, key: str, pipeline: str) -> None:
    latents, factors = some_latents(key), read_factors(key)
    result = available(pipeline, pipelines.decode, service.model(key), latents)
    if pipeline == "Kandinsky5T2IPipeline":
        factors.pop("shift_factor")
    sent = {**sent_along(key, pipeline, latents), **factors}
    assert_close(service.tensor(key, result.latent, "decode", **sent), as_decoded(result, model_for(key)))


@pytest.mark.parametrize(("key", "pipeline"), ENCODERS)
def test_encoding_equals_the_pipeline(service: Service, key: str, pipeline: str) -> None:
    model, vae = model_for(key), service.model(key)
    frames = 1 if pipeline in FIRST_FRAME or key == "svd" else model.decoded_frames(latent_frames(model))
    pixels = some_pixels(model, frames)
    expected = available(pipeline, pipelines.encode, vae, pixels[:, :, 0] if key == "svd" else pixels)
    scaling: dict[str, Any] = {"do_scaling": key != "svd"}  # this pipeline scales only the latents that it denoises
    if vae.config.get("invert_scale_latents"):
        factor = vae.config.scaling_factor
        scaling = {"scaling_factor": 1 / factor if pipeline == "CogVideoXImageToVideoPipeline" else factor}
    latents = service.tensor(key, pixels, "encode", latents_layout=LAYOUTS.get(pipeline), **scaling)
    # MiniMax-H3's pipeline rounds latents to float16
    assert_close(latents.reshape(expected.shape), expected, 1e-3 if key == "minimax-h3" else 1e-5)


@pytest.mark.parametrize("key", NETWORKS)
@pytest.mark.parametrize("name", ["full", "reduced", "sliced", "tiled"])
def test_every_mode_equals_diffusers(service: Service, mode: Callable[[str], None], key: str, name: str) -> None:
    """Test a batch of two, or one video in tiles, with sizes that no patch divides.

    A mode that a model does not have is refused.
    """
    model, vae = model_for(key), service.model(key)
    mode(name)
    sides = {"rows": 5, "columns": 6} if name == "tiled" else {"rows": 3, "columns": 2}
    batch = 1 if name == "tiled" and model.kind == "video" else 2  # in tiles a batch runs one by one, as in slices
    frames = latent_frames(model, 2 if name == "tiled" and not model.padding_frames else 3)
    latents = some_latents(key, batch, **sides, frames=frames)
    pixels = some_pixels(model, model.decoded_frames(frames), batch, **sides)
    offered = {
        "full": model.runs_batches and not model.always_tiles,
        "reduced": is_known(vae),
        "sliced": not model.always_tiles,
        "tiled": True,
    }[name]
    for task, inputs in (("decode", latents), ("encode", pixels)):
        sent = {"output_type": "pt", "latents_layout": model.pipeline_layout and "BCFHW"} if task == "decode" else {}
        if model.kind == "image":
            sent.pop("latents_layout", None)
        if model.takes_scaled:
            sent["do_scaling"] = True
            if task == "decode" and model.raw_layouts:
                sent["normalized"] = True
        if name == "full":
            sent["exact"] = True  # with VAE_FAST=1 no other request gets it
        response = service.post(key, inputs, task, **sent)
        if not offered or (name == "tiled" and task not in model.tiles):
            assert response.status_code == 422, response.text
            continue
        assert as_tensor(response).isfinite().all()
        assert response.headers["X-VAE-Mode"] == name
        expected = [compute_expected(vae, model, task, item, tiled=name == "tiled") for item in inputs.split(1)]
        # few channels of an image's layers make rounding larger
        assert_close(as_tensor(response), torch.cat(expected), 1e-4 if name == "reduced" or model.has_layers else 3e-5)


def compute_expected(vae: Any, model: type[Model], task: str, item: Tensor, tiled: bool) -> Tensor:
    pixel_range = PixelRange(model.pixel_statistics)
    if model.always_tiles:
        item = item if task == "decode" else pixel_range.to_own(item)
        return pixel_range.from_own(by_itself(vae, item)) if task == "decode" else encode_at_once(vae, item)
    if not tiled:
        return by_itself(vae, item) if task == "decode" else encode_at_once(vae, item)
    copy = type(vae).from_config(vae.config)
    copy.load_state_dict(vae.state_dict())
    small_tiles(copy.eval(), model.vae_scale_factor)
    copy.enable_tiling()
    return by_itself(copy, item) if task == "decode" else encode_at_once(copy, item)


TRANSPARENT = [key for key in ("qwen-image-2.1", "qwen-image-layered") if key in SERVED]


class TestTransparency:
    """Tests of images with transparency, and of layers."""

    @pytest.mark.parametrize("has_first", [True, False])
    @pytest.mark.parametrize("layout", ["packed", "BCFHW"])
    def test_layers_equal_the_pipeline(self, service: Service, layout: str, has_first: bool) -> None:
        """Test latents with the original image before the layers, as the pipeline has them, and of layers alone."""
        key, layers = "qwen-image-layered", 3
        latents = torch.randn(1, 16, layers + 1, 6, 4, generator=torch.Generator().manual_seed(0))
        result = pipelines.decode("QwenImageLayeredPipeline", service.model(key), latents, layers=layers)
        sent = {"height": 48, "width": 32, "do_scaling": True, "layers": layers}
        tensor = latents if layout == "BCFHW" else result.latent.unflatten(1, (layers + 1, -1))
        if not has_first:
            tensor = tensor[:, :, 1:] if layout == "BCFHW" else tensor[:, 1:]
        tensor = tensor.contiguous() if layout == "BCFHW" else tensor.flatten(1, 2).contiguous()
        decoded = service.tensor(key, tensor, "decode", output_type="pt", **sent)
        assert decoded.shape == (layers, 4, 48, 32)
        assert_close(decoded, result.decoded[:, :, 0], 1e-4)  # a batch rounds differently
        archive = service.post(key, tensor, "decode", headers={"Accept": "application/zip"}, image_format="png", **sent)
        with zipfile.ZipFile(io.BytesIO(archive.content)) as files:
            images = [np.asarray(Image.open(files.open(name))) for name in files.namelist()]
        assert_same_pixels(np.stack(images), result.pixels[0], decoded)

    def test_layers_are_named(self, service: Service) -> None:
        latents = torch.zeros(1, 16, 4, 6, 4)
        error = service.refusal("qwen-image-layered", latents, "decode", output_type="pt")
        assert "latents of several layers need `layers`, the number of layers" in error
        for layers in (2, 5):
            service.refusal("qwen-image-layered", latents, "decode", output_type="pt", layers=layers)
        error = service.refusal("qwen-image", torch.zeros(1, 16, 1, 6, 4), "decode", output_type="pt", layers=1)
        assert error == "`layers`: this model's images have no layers; leave it out"
        one = service.tensor("qwen-image-layered", latents[:, :, :1].contiguous(), "decode", output_type="pt")
        assert one.shape == (1, 4, 48, 32)

    @pytest.mark.parametrize("key", TRANSPARENT)
    def test_files_keep_it(self, service: Service, key: str) -> None:
        latents = some_latents(key)
        sent = {"output_type": "pt", "partial_postprocess": True}
        expected = service.tensor(key, latents, "decode", **sent).numpy()[0]
        assert expected.shape[-1] == 4

        def image(**parameters: Any) -> Image.Image:
            return Image.open(io.BytesIO(service.post(key, latents, "decode", **parameters).content))

        for default in ({}, {"image_format": "png"}):
            assert image(**default).mode == "RGBA"
            assert np.array_equal(np.asarray(image(**default)), expected)
        assert image(image_format="webp").mode == "RGBA"
        for jpeg in ({"image_format": "jpg"}, {"image_format": "jpeg", "quality": 50}):
            error = service.refusal(key, latents, "decode", **jpeg)
            assert error.startswith("this model's images have transparency, and JPEG has none: send background=white")
        assert service.post(key, latents, "decode", headers={"Accept": "image/jpeg"}).status_code == 422
        laid = Image.new("RGBA", image().size, "#102030")
        laid.alpha_composite(Image.fromarray(expected))
        png = image(image_format="png", background="#102030")
        assert png.mode == "RGB"
        assert np.array_equal(np.asarray(png), np.asarray(laid.convert("RGB")))
        laid_jpeg = image(image_format="jpg", background="white")
        assert (laid_jpeg.format, laid_jpeg.mode) == ("JPEG", "RGB")
        assert "background" in service.refusal(key, latents, "decode", image_format="jpg", background="#10203")
        error = service.refusal(key, latents, "decode", output_type="pt", background="white")
        assert error.startswith("`background`: only a decoded image is laid on a color")

    @pytest.mark.parametrize("key", TRANSPARENT)
    def test_files_and_tensors_are_encoded_with_it(self, service: Service, key: str) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (48, 32, 4), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        opaque = np.dstack([pixels[..., :3], np.full((48, 32), 255, np.uint8)])

        def encoded(image: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
            return service.tensor(key, tensor.contiguous(), "encode")

        response = requests.post(f"{service.url}/{key}/encode", data=file.getvalue(), timeout=60)
        assert_close(as_tensor(response), encoded(pixels))
        for task in ("encode", ""):
            assert_close(service.tensor(key, torch.from_numpy(pixels), task), encoded(pixels))
        assert_close(encoded(pixels[..., :3]), encoded(opaque))
        assert_close(service.tensor(key, torch.from_numpy(pixels[..., :3].copy()), "encode"), encoded(opaque))
        assert not torch.allclose(encoded(pixels), encoded(opaque))
        error = service.refusal("qwen-image", torch.from_numpy(pixels), "encode")
        assert "is no shape of pixels" in error
        channels = torch.zeros(model_for(key).latent_channels, 32, 4, dtype=torch.uint8)  # rows, or channels of latents
        assert "POST pixels to /encode and latents to /decode" in service.refusal(key, channels, "")

    @pytest.mark.parametrize("key", TRANSPARENT)
    @torch.no_grad()
    def test_the_remote_vae_has_it(self, service: Service, key: str) -> None:
        local, remote = service.model(key), RemoteVAE(f"{service.url}/{key}")
        pixels = some_pixels(model_for(key), 1).unsqueeze(2)
        latents = local.encode(pixels).latent_dist.mode()
        assert_close(remote.encode(pixels).latent_dist.mode(), latents)
        assert_close(remote.decode(latents).sample, local.decode(latents).sample)
        (image,) = remote.remote.decode_async(latents, do_scaling=False).result()
        assert image.mode == "RGBA"


class TestAmbiguousInput:
    """Tests of ambiguous input: the error names the parameter that resolves it."""

    @pytest.mark.parametrize("pipeline_layout", [True, False])
    def test_as_many_frames_as_channels(self, service: Service, pipeline_layout: bool) -> None:
        latents = some_latents("cogvideox", frames=16, rows=4, columns=4)
        sent = latents.movedim(1, 2).contiguous() if pipeline_layout else latents
        error = service.refusal("cogvideox", sent, "decode", output_type="pt", num_frames=61)
        assert "say which with `latents_layout`" in error
        layout = "BFCHW" if pipeline_layout else "BCFHW"
        parameters = {"output_type": "pt", "num_frames": 61, "latents_layout": layout}
        assert_close(
            service.tensor("cogvideox", sent, "decode", **parameters), by_itself(service.model("cogvideox"), latents)
        )

    def test_a_padding_frame(self, service: Service) -> None:
        result = pipelines.decode(
            "CogVideoXPipeline", service.model("cogvideox-1.5"), some_latents("cogvideox-1.5"), additional_frames=1
        )
        latents = torch.cat([result.latent, result.latent[:, :1]], dim=1)
        result = pipelines.decode(
            "CogVideoXPipeline", service.model("cogvideox-1.5"), latents.movedim(1, 2), additional_frames=1
        )
        parameters = {"output_type": "pt", "do_scaling": True}
        assert "send `num_frames`" in service.refusal("cogvideox-1.5", result.latent, "decode", **parameters)
        decoded = service.tensor("cogvideox-1.5", result.latent, "decode", **parameters, num_frames=9)
        assert_close(decoded, result.decoded)

    @pytest.mark.parametrize(("key", "layout"), [("ltx-2", "BCFHW"), ("flux2", "BCHW")])
    def test_latents_that_may_be_raw(self, service: Service, key: str, layout: str) -> None:
        latents = some_latents(key)
        error = service.refusal(key, latents, "decode", output_type="pt", do_scaling=True)
        assert f"pipelines give {layout} latents either denormalized or normalized" in error
        assert_close(
            service.tensor(key, latents, "decode", output_type="pt", do_scaling=False),
            by_itself(service.model(key), latents),
        )

    def test_three_frames_as_latents_or_pixels(self, service: Service) -> None:
        """Test the root path, which accepts both. Parameters of latents identify them."""
        latents = some_latents("cogvideox", frames=3, rows=8, columns=8)
        sent = latents.movedim(1, 2).contiguous()
        assert "POST pixels to /encode and latents to /decode" in service.refusal("cogvideox", sent, "")
        decoded = service.tensor("cogvideox", sent, "", output_type="pt")
        assert_close(decoded, by_itself(service.model("cogvideox"), latents))

    def test_scaling_for_an_image_of_cogvideox_15(self, service: Service) -> None:
        error = service.refusal("cogvideox-1.5", some_pixels(model_for("cogvideox-1.5"), 1), "encode", do_scaling=True)
        assert "send scaling_factor=1.42" in error


class TestFrames:
    """Tests that nothing is dropped silently."""

    @pytest.mark.parametrize(
        ("key", "frames", "nearest"),
        [
            ("hunyuan-video", 4, "1 or 5"),
            ("wan-2.1", 12, "9 or 13"),
            ("ltx-video", 10, "9 or 17"),
            ("mochi", 8, "7 or 13"),
            ("cogvideox", 10, "9 or 16"),
            ("easyanimate", 2, "1 or 5"),
            # diffusers' encoder would pad 26 frames to two clips, and drop four of them
            pytest.param("minimax-h3", 26, "22 or 39", marks=NEWEST),
        ],
    )
    def test_a_tensor_off_the_grid_is_refused(self, service: Service, key: str, frames: int, nearest: str) -> None:
        error = service.refusal(key, some_pixels(model_for(key), frames), "encode")
        assert error.endswith(f"this VAE would drop some of the {frames} frames; send {nearest}")

    @NEWEST
    def test_a_video_shorter_than_a_clip(self, service: Service) -> None:
        """Test MiniMax-H3, which encodes an image alone, and decodes three latent frames or more."""
        image = service.tensor("minimax-h3", some_pixels(model_for("minimax-h3"), 1), "encode")
        assert image.shape[2] == 1
        for frames in (1, 2):
            latents = some_latents("minimax-h3", frames=frames)
            error = service.refusal("minimax-h3", latents, "decode", output_type="pt")
            assert error == f"{frames} latent frames: this VAE decodes 3 or more"
        frames = {
            count: service.tensor("minimax-h3", some_latents("minimax-h3", frames=count), "decode", output_type="pt")
            for count in (3, 6, 8)
        }
        assert {count: decoded.shape[2] for count, decoded in frames.items()} == {3: 9, 6: 18, 8: 26}

    def test_every_frame_count_fits_frame_by_frame(self, service: Service) -> None:
        for frames in (1, 2, 3):
            latents = service.tensor("svd", some_pixels(model_for("svd"), frames), "encode")
            assert latents.shape[2] == frames

    def test_a_file_is_cut_and_the_response_has_the_frame_count(self, service: Service) -> None:
        video = service.post("wan-2.1", some_latents("wan-2.1"), "decode", output_type="mp4").content
        with av.open(io.BytesIO(video)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        assert len(frames) == 9
        whole = requests.post(f"{service.url}/wan-2.1/encode", data=video, timeout=60)
        assert "X-VAE-Frames" not in whole.headers
        cut = requests.post(f"{service.url}/hunyuan-video/encode", data=as_mp4(frames[:7]), timeout=60)
        assert cut.headers["X-VAE-Frames"] == "the first 5 of 7"
        assert as_tensor(cut).shape[2] == 2


def as_mp4(frames: list[Any]) -> bytes:
    return write_mp4([np.asarray(frame) for frame in frames], fps=8)


@pytest.mark.slow
class TestRecovery:
    """Tests that a pass that fails midway leaves no trace in the model."""

    @pytest.mark.parametrize("key", ["easyanimate", "wan-2.1", "qwen-image", "cogvideox", "hunyuan-video", "ltx-2"])
    def test_the_next_pass_is_correct(self, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
        vae = VAE(build(key), model_for(key))
        raw = some_latents(key).unsqueeze(2) if key == "qwen-image" else some_latents(key)
        pixels = some_pixels(model_for(key), 2 * model_for(key).frame_factor + 1)
        expected = vae.decode(raw)[0], vae.encode(pixels)[0]
        for coder, run, inputs in ((vae.model.decoder, vae.decode, raw), (vae.model.encoder, vae.encode, pixels)):
            last = [module for module in coder.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d))][-1]
            with monkeypatch.context() as patch:
                patch.setattr(last, "forward", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    run(inputs)
        assert torch.equal(vae.decode(raw)[0], expected[0])
        assert torch.equal(vae.encode(pixels)[0], expected[1])


def test_a_limit_of_the_models_code_is_a_422(service: Service, mode: Callable[[str], None]) -> None:
    """Test LTX-2, which reflects at its edges, so that a last tile of one latent is too small."""
    mode("tiled")
    error = service.refusal("ltx-2", some_latents("ltx-2", rows=5, columns=7), "decode", output_type="pt")
    assert "cannot decode `shape` [1, 128, 3, 5, 7] in mode tiled: " in error


@pytest.mark.filterwarnings("ignore:`do_scaling` is deprecated:FutureWarning")  # of its own default
class TestDiffusersClient:
    """Tests of `remote_decode` with its own defaults."""

    def test_wan(self, service: Service) -> None:
        vae, latents = service.model("wan-2.1"), some_latents("wan-2.1")
        expected = as_decoded(pipelines.decode("WanPipeline", vae, latents), model_for("wan-2.1"))
        url = f"{service.url}/wan-2.1"
        assert_close(remote_decode(url, latents, output_type="pt", return_type="pt"), expected)
        frames = remote_decode(url, latents, processor=VideoProcessor(), return_type="pt")
        assert_close(frames, (expected[0].movedim(1, 0) / 2 + 0.5).clamp(0, 1))
        video = remote_decode(url, latents, output_type="mp4", return_type="mp4")
        with av.open(io.BytesIO(video)) as container:
            assert len(list(container.decode(video=0))) == 9
            assert container.streams.video[0].average_rate == 16

    @pytest.mark.parametrize(
        ("key", "pipeline"),
        [("qwen-image", "QwenImagePipeline"), ("flux2", "Flux2Pipeline"), ("sd3", "StableDiffusion3Pipeline")],
    )
    def test_images(self, service: Service, key: str, pipeline: str) -> None:
        """Send the latents of the pipeline. Packed ones have height and width, and the scaling is the default."""
        latents = some_latents(key)
        result = pipelines.decode(pipeline, service.model(key), latents)
        size = {"height": 32, "width": 16} if result.latent.ndim == 3 else {}
        url = f"{service.url}/{key}"
        jpeg = remote_decode(url, result.latent.contiguous(), **size)
        assert (jpeg.format, jpeg.size) == ("jpeg", (16, 32))
        assert np.abs(np.asarray(jpeg).astype(int) - result.pixels[0]).mean() < 6  # noise, which is hardest to compress
        png = remote_decode(url, result.latent.contiguous(), image_format="png", **size)
        assert np.abs(np.asarray(png).astype(int) - result.pixels[0]).max() <= 1

    def test_cogvideox(self, service: Service) -> None:
        result = pipelines.decode("CogVideoXPipeline", service.model("cogvideox"), some_latents("cogvideox"))
        url = f"{service.url}/cogvideox"
        latents = result.latent.contiguous()
        assert_close(remote_decode(url, latents, output_type="pt", return_type="pt"), result.decoded)
        video = remote_decode(url, latents, output_type="mp4", return_type="mp4")
        with av.open(io.BytesIO(video)) as container:
            assert len(list(container.decode(video=0))) == 9

    def test_further_parameters_go_in_the_url(self, service: Service) -> None:
        latents = some_latents("ltx-2")
        result = available("SanaVideoPipeline", pipelines.decode, service.model("ltx-2"), latents)
        url = f"{service.url}/ltx-2?normalized=true"
        decoded = remote_decode(url, result.latent.contiguous(), output_type="pt", return_type="pt")
        assert_close(decoded, result.decoded)
