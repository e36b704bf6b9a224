"""Each model gives over HTTP what its own pipeline in diffusers makes of the same latents and pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import requests
import torch
from torch import Tensor

from handlers.model import Model
from handlers.serving.autoencoder import DecodeOptions, decode_at_once, encode_at_once, has_frames
from handlers.serving.low_memory import has_reduced_peak
from handlers.serving.output import describe, tensor_bytes
from scripts.local_server import serve
from tests import pipelines
from tests.checkpoints import SMALL, build, model_of, save, small_tiles
from tests.pipelines import FIRST_FRAME, PIPELINES, Unavailable

SERVED = [key for key in SMALL if model_of(key)]
DECODERS = [(key, pipeline) for key in SERVED for pipeline in PIPELINES[key][0]]
ENCODERS = [(key, pipeline) for key in SERVED for pipeline in PIPELINES[key][1]]
SEED = 7
NOISE = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
DENORMALIZED = ("LTX2Pipeline", "Flux2KleinPipeline")
"""They give raw latents."""
LAYOUTS = {
    **dict.fromkeys(("Flux2Pipeline", "Flux2KleinPipeline"), "patchified"),
    **dict.fromkeys(("LTXConditionPipeline", "LTXImageToVideoPipeline"), "packed"),
    **dict.fromkeys(("CogVideoXVideoToVideoPipeline", "CogVideoXImageToVideoPipeline"), "BFCHW"),
    **dict.fromkeys(("Kandinsky5I2IPipeline", "Kandinsky5I2VPipeline"), "BFHWC"),
}
"""Of what pipelines encode to, where it is not the VAE's own."""
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


@dataclass(frozen=True)
class Service:
    """The server of all small checkpoints, and the models themselves."""

    url: str
    model: Callable[[str], Any]

    def post(self, key: str, tensor: Tensor, task: str, **parameters: Any) -> requests.Response:
        shape, dtype = describe(tensor)
        return requests.post(
            f"{self.url}/{key}/{task}",
            data=tensor_bytes(tensor),
            params={"shape": shape, "dtype": dtype, **parameters},
            headers={"Content-Type": "tensor/binary"},
            timeout=60,
        )

    def tensor(self, key: str, tensor: Tensor, task: str, **parameters: Any) -> Tensor:
        return as_tensor(self.post(key, tensor, task, **parameters))

    def refusal(self, key: str, tensor: Tensor, task: str, **parameters: Any) -> str:
        response = self.post(key, tensor, task, **parameters)
        assert response.status_code in (400, 422), response.headers
        return response.json()["error"]


def as_tensor(response: requests.Response) -> Tensor:
    assert response.ok, response.text
    dtype = getattr(torch, response.headers["dtype"])
    return torch.frombuffer(bytearray(response.content), dtype=dtype).reshape(json.loads(response.headers["shape"]))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder, models = tmp_path_factory.mktemp("checkpoints"), {}
    for key in SERVED:
        save(key, folder / key)

    def model(key: str) -> Any:
        if key not in models:
            models[key] = build(key)
        return models[key]

    log = tmp_path_factory.mktemp("log") / "models.log"
    with serve("--folder", str(folder), log=log, command=("-m", "tests.models_server")) as url:
        yield Service(url, model)


@pytest.fixture
def mode(service: Service) -> Iterator[Callable[[str], None]]:
    """Has all requests of a test run in one mode."""

    def force(name: str) -> None:
        requests.post(f"{service.url}/mode/{name}", timeout=5).raise_for_status()

    yield force
    force("auto")


def some_latents(key: str, batch: int = 1, rows: int = 6, columns: int = 4, frames: int = 3, seed: int = 0) -> Tensor:
    """As a pipeline unpacks them, [B, C, h, w] or [B, C, F, h, w], in the range that its transformer gives."""
    model = model_of(key)
    time = (frames,) if model.kind == "video" else ()
    shape = (batch, model.latent_channels, *time, rows, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_pixels(model: type[Model], frames: int, batch: int = 1, rows: int = 4, columns: int = 6) -> Tensor:
    time = (frames,) if model.kind == "video" else ()
    sides = rows * model.vae_scale_factor, columns * model.vae_scale_factor
    return torch.rand((batch, 3, *time, *sides), generator=torch.Generator().manual_seed(0)) * 2 - 1


def available(pipeline: str, call: Callable[..., Any], *args: Any, **given: Any) -> Any:
    """What the call of a pipeline gives; skips the test where this version of diffusers is known not to have it."""
    try:
        return call(pipeline, *args, **given)
    except Unavailable:
        missing = MISSING.get(diffusers.__version__.rsplit(".", 1)[0], set())
        assert pipeline in missing, f"{pipeline} should be there"
        pytest.skip(f"diffusers {diffusers.__version__} has no {pipeline} for it")


def sent_along(key: str, pipeline: str, latents: Tensor) -> dict[str, Any]:
    """What a client sends with the latents that a pipeline gave."""
    model = model_of(key)
    rows, columns = latents.shape[-2:]
    sent: dict[str, Any] = {
        "height": rows * model.vae_scale_factor,
        "width": columns * model.vae_scale_factor,
        "do_scaling": pipeline not in DENORMALIZED,
        "output_type": "pt",
    }
    if model.kind == "video":
        sent["num_frames"] = (latents.shape[2] - 1) * model.frame_factor + 1
    if model.raw_layouts:
        sent["normalized"] = pipeline not in DENORMALIZED
    return sent


def factors_of(key: str) -> dict[str, float]:
    """The factors in the config of the small checkpoint."""
    config = SMALL[key][1]
    return {name: config[name] for name in ("scaling_factor", "shift_factor") if name in config}


def as_decoded(made: pipelines.Made, model: type[Model]) -> Tensor:
    """What the pipeline's VAE gave, without the one frame of a picture, and the frames of a video as such."""
    if model.kind == "image":
        return made.decoded[:, :, 0] if made.decoded.ndim == 5 else made.decoded
    return made.decoded if made.decoded.ndim == 5 else made.decoded.movedim(0, 1)[None]


def by_itself(vae: Any, raw: Tensor) -> Tensor:
    """What the VAE gives for the latents of one item, called directly."""
    image_as_video = raw.ndim == 4 and has_frames(vae)
    with torch.no_grad():
        decoded = decode_at_once(vae, raw.unsqueeze(2) if image_as_video else raw, DecodeOptions())
    return decoded[:, :, 0] if image_as_video else decoded


def assert_close(result: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected, atol=tolerance * max(1.0, expected.abs().max().item()), rtol=0)


def assert_same_pixels(pixels: np.ndarray, expected: np.ndarray, decoded: Tensor) -> None:
    """The same uint8, but where the decoder's value is on the edge between two: those are one apart at most."""
    if decoded.ndim == 5:
        decoded = decoded[0].movedim(1, 0)
    exact = (decoded.movedim(1, -1) / 2 + 0.5).clamp(0, 1).numpy() * 255
    on_edge = np.abs(exact % 1 - 0.5) < 0.01
    assert pixels.shape == expected.shape
    assert np.array_equal(pixels[~on_edge], expected[~on_edge])
    assert np.abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("key", "pipeline"), DECODERS)
def test_decoding_gives_what_the_pipeline_gives(service: Service, key: str, pipeline: str) -> None:
    model, latents = model_of(key), some_latents(key)
    conditions = NOISE if service.model(key).config.get("timestep_conditioning") else {}
    generator = torch.Generator().manual_seed(SEED)
    made = available(pipeline, pipelines.decode, service.model(key), latents, generator=generator, **conditions)
    sent = {**sent_along(key, pipeline, latents), **conditions, "seed": SEED}
    decoded = service.tensor(key, made.latent, "decode", **sent)
    if pipeline == "ErnieImagePipeline":  # it has an epsilon of its own, which is not the VAE's
        assert_close(decoded, as_decoded(made, model), 1e-3)
        return
    assert_close(decoded, as_decoded(made, model))
    pixels = service.tensor(key, made.latent, "decode", **sent, partial_postprocess=True).numpy()
    assert_same_pixels(pixels, made.pixels[0] if model.kind == "video" else made.pixels, decoded)


@pytest.mark.parametrize(("key", "pipeline"), [(key, name) for key, name in DECODERS if factors_of(key)])
def test_explicit_factors_give_what_the_pipeline_gives(service: Service, key: str, pipeline: str) -> None:
    latents, factors = some_latents(key), factors_of(key)
    made = available(pipeline, pipelines.decode, service.model(key), latents)
    if pipeline == "Kandinsky5T2IPipeline":
        factors.pop("shift_factor")
    sent = {**sent_along(key, pipeline, latents), **factors}
    assert_close(service.tensor(key, made.latent, "decode", **sent), as_decoded(made, model_of(key)))


@pytest.mark.parametrize(("key", "pipeline"), ENCODERS)
def test_encoding_gives_what_the_pipeline_gives(service: Service, key: str, pipeline: str) -> None:
    model, vae = model_of(key), service.model(key)
    frames = 1 if pipeline in FIRST_FRAME or key == "svd" else 2 * model.frame_factor + 1
    pixels = some_pixels(model, frames)
    expected = available(pipeline, pipelines.encode, vae, pixels[:, :, 0] if key == "svd" else pixels)
    scaling: dict[str, Any] = {"do_scaling": key != "svd"}  # that one scales what it denoises only
    if vae.config.get("invert_scale_latents"):
        factor = vae.config.scaling_factor
        scaling = {"scaling_factor": 1 / factor if pipeline == "CogVideoXImageToVideoPipeline" else factor}
    latents = service.tensor(key, pixels, "encode", latents_layout=LAYOUTS.get(pipeline), **scaling)
    assert_close(latents.reshape(expected.shape), expected)


@pytest.mark.parametrize("key", SERVED)
@pytest.mark.parametrize("name", ["full", "reduced", "sliced", "tiled"])
def test_every_mode_gives_what_diffusers_gives(
    service: Service, mode: Callable[[str], None], key: str, name: str
) -> None:
    """A batch of two, of sizes that no patch goes into; a mode that a model does not have is not offered."""
    model, vae = model_of(key), service.model(key)
    mode(name)
    latents = torch.cat([some_latents(key, rows=5, columns=6, seed=seed) for seed in (1, 2)])
    pixels = some_pixels(model, 2 * model.frame_factor + 1, batch=2, rows=5, columns=6)
    offered = {
        "full": model.runs_batches,
        "reduced": has_reduced_peak(vae),
        "sliced": True,
        "tiled": True,
    }[name]
    for task, inputs in (("decode", latents), ("encode", pixels)):
        sent = {"output_type": "pt", "latents_layout": model.pipeline_layout and "BCFHW"} if task == "decode" else {}
        if model.kind == "image":
            sent.pop("latents_layout", None)
        response = service.post(key, inputs, task, **sent)
        if not offered or (name == "tiled" and task not in model.tiles):
            assert response.status_code == 422, response.text
            continue
        assert as_tensor(response).isfinite().all()
        assert response.headers["X-VAE-Mode"] == name
        expected = [expected_of(vae, model, task, one, tiled=name == "tiled") for one in inputs.split(1)]
        assert_close(as_tensor(response), torch.cat(expected), 1e-4 if name == "reduced" else 3e-5)


def expected_of(vae: Any, model: type[Model], task: str, one: Tensor, tiled: bool) -> Tensor:
    if not tiled:
        return by_itself(vae, one) if task == "decode" else encode_at_once(vae, one)
    copy = type(vae).from_config(vae.config)
    copy.load_state_dict(vae.state_dict())
    small_tiles(copy.eval(), model.vae_scale_factor)
    copy.enable_tiling()
    return by_itself(copy, one) if task == "decode" else encode_at_once(copy, one)
