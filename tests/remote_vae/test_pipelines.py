"""Tests that pipelines of diffusers make the same images with a remote VAE as with a local one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import AutoencoderKL, FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

from handlers import MODELS
from handlers.serving.vae.weights import find_class
from remote_vae import RemoteVAE, RemoteVAEError
from remote_vae.vae import empty_vae
from tests.support.small_pipelines import CASES, Case, make, run
from tests.support.small_service import Service
from tests.support.values import assert_same

pytestmark = pytest.mark.filterwarnings(
    # warnings of diffusers' schedulers with the newest torch and numpy
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

FLUX = next(case for case in CASES if case.pipeline == "FluxPipeline")


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join((case.pipeline, *case.image_arguments)))
def test_images_are_the_same(service: Service, case: Case) -> None:
    local = run(make(case, service.model(case.key)), case)
    remote = run(make(case, RemoteVAE(f"{service.url}/{case.key}", uint8=True)), case)
    assert len(remote) == len(local) >= 1
    assert np.asarray(local[0]).std() > 20  # not plain gray
    for ours, theirs in zip(remote, local, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("output_type", ["pt", "np"])
def test_floats_are_the_same(service: Service, output_type: str) -> None:
    """Compare bit by bit, because floats are not rounded to uint8."""
    local = run(make(FLUX, service.model("flux")), FLUX, output_type=output_type)[0]
    remote = run(make(FLUX, RemoteVAE(f"{service.url}/flux")), FLUX, output_type=output_type)[0]
    assert_same(remote, local)


def test_every_way_to_give_a_pipeline_a_vae(service: Service, tmp_path: Path) -> None:
    expected = run(make(FLUX, service.model("flux")), FLUX)[0]
    remote = RemoteVAE(f"{service.url}/flux")
    assert type(remote) is AutoencoderKL

    pipe = make(FLUX, service.model("flux"))
    pipe.save_pretrained(tmp_path / "whole")
    loaded = FluxPipeline.from_pretrained(tmp_path / "whole", vae=remote, **empty_modules())
    pipe.vae = remote
    remote.enable_tiling()
    remote.enable_slicing()
    copied = copy.deepcopy(pipe)
    for each in (loaded, pipe, pipe.to("cpu"), copied):
        each.set_progress_bar_config(disable=True)
        assert_same(run(each, FLUX)[0], expected)

    again = FluxPipeline.from_pipe(FluxImg2ImgPipeline.from_pipe(pipe))
    again.set_progress_bar_config(disable=True)
    assert again.vae is remote
    assert_same(run(again, FLUX)[0], expected)

    pipe.save_pretrained(tmp_path / "config")
    assert [file.name for file in (tmp_path / "config" / "vae").iterdir()] == ["config.json"]
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        FluxPipeline.from_pretrained(tmp_path / "config", **empty_modules())
    loaded = FluxPipeline.from_pretrained(tmp_path / "config", vae=remote, **empty_modules())
    assert loaded.vae is remote


@pytest.mark.parametrize("hook", [cpu_offload, lambda vae: cpu_offload_with_hook(vae, "cpu")])
def test_offloading_hooks(service: Service, hook: Callable[[Any], Any]) -> None:
    """Set the hooks of `enable_sequential_cpu_offload` and `enable_model_cpu_offload`."""
    remote = RemoteVAE(f"{service.url}/flux")
    hook(remote)
    expected = run(make(FLUX, service.model("flux")), FLUX)[0]
    assert_same(run(make(FLUX, remote), FLUX)[0], expected)


def empty_modules() -> dict[str, None]:
    return dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))


def test_other_dtypes(service: Service) -> None:
    """Test that the pipeline and its output keep the dtype of the user. The endpoint may use another."""
    remote = RemoteVAE(f"{service.url}/flux")
    pipe = make(FLUX, remote).to(torch.bfloat16)
    assert remote.dtype == torch.bfloat16
    embeddings = {name: value.bfloat16() for name, value in FLUX.arguments.items()}
    assert run(pipe, FLUX, **embeddings, output_type="pt")[0].dtype == torch.bfloat16
    assert run(pipe, FLUX, **embeddings)[0].size == (64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in MODELS if hasattr(diffusers, MODELS[key].vae_class)])
def test_a_remote_vae_takes_no_memory(key: str) -> None:
    """Compare with the class at its published size."""
    model = MODELS[key]
    with torch.device("meta"):
        real = find_class(model.vae_class).from_config(model.published_config)
    config = {"vae_class": model.vae_class, "vae_config": dict(real.config), "dtype": "float16", "buffers": {}}
    vae = empty_vae(config)
    assert sum(value.numel() for value in vae.state_dict().values()) == 0
    assert vae.dtype == torch.float16
    assert vae.device == torch.device("cpu")
    assert [name for name, _ in vae.named_modules()] == [name for name, _ in real.named_modules()]


def test_statistics_equal_the_checkpoints(service: Service) -> None:
    for key, name in (("flux2", "bn.running_var"), ("ltx-video", "latents_mean")):
        ours, theirs = (
            dict(vae.named_buffers())[name] for vae in (RemoteVAE(f"{service.url}/{key}"), service.model(key))
        )
        assert_same(ours, theirs)


@pytest.mark.parametrize("key", ["sd-v1", "taesd", "sana", "svd", "cogvideox", "qwen-image", "ltx-video-0.9.1"])
@torch.no_grad()
def test_methods_return_the_types_of_the_class(service: Service, key: str) -> None:
    local, remote = service.model(key), RemoteVAE(f"{service.url}/{key}")
    generator = torch.Generator().manual_seed(0)
    frames = {"cogvideox": (9,), "qwen-image": (1,), "ltx-video-0.9.1": (9,)}.get(key, ())
    pixels = torch.rand((2, 3, *frames, 64, 96), generator=generator) * 2 - 1
    ours, theirs = remote.encode(pixels), local.encode(pixels)
    assert type(ours) is type(theirs)
    if "latent_dist" in theirs:
        assert_same(ours.latent_dist.parameters, theirs.latent_dist.parameters)
        sampled = [each.latent_dist.sample(torch.Generator().manual_seed(1)) for each in (ours, theirs)]
        assert_same(*sampled)
        latents = theirs.latent_dist.mode().clone()
    else:
        assert_same(ours[0], theirs[0])
        latents = theirs[0]
    options = {"svd": {"num_frames": 2}, "ltx-video-0.9.1": {"temb": torch.tensor([0.05, 0.05])}}.get(key, {})
    decoded = remote.decode(latents, **options)
    assert_same(decoded.sample, local.decode(latents, **options).sample)
    assert_same(remote.decode(latents, return_dict=False, **options)[0], decoded.sample)


def test_batches_are_split_at_the_services_limit(service: Service) -> None:
    remote, local = RemoteVAE(f"{service.url}/sd-v1"), service.model("sd-v1")
    remote.remote.config["limits"]["max_batch"] = 2
    latents = torch.randn((5, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(remote.decode(latents).sample, local.decode(latents).sample, atol=1e-4)
    pixels = torch.rand((3, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(remote.encode(pixels)[0].mode(), local.encode(pixels)[0].mode(), atol=1e-5)


ODD = [
    ("sd-v1", (2, 3, 60, 68)),  # drops the pixels that its strides do not reach
    ("tiny", (1, 3, 61, 70)),
    ("taesd", (1, 3, 60, 68)),  # pads
    ("qwen-image", (1, 3, 1, 60, 68)),
    ("svd", (3, 3, 60, 68)),
    ("wan-2.1", (1, 3, 10, 60, 68)),  # omits the tenth frame
    ("hunyuan-video", (1, 3, 10, 64, 64)),  # encodes it into the last latent frame
    ("cogvideox", (1, 3, 10, 64, 64)),
    ("mochi", (1, 3, 10, 64, 64)),
    ("ltx-video", (1, 3, 10, 64, 64)),
]
"""Pixels that the class accepts although they do not fit its latents."""


@pytest.mark.parametrize(("key", "shape"), ODD)
def test_partial_sizes_are_encoded_as_in_the_local_class(
    service: Service, key: str, shape: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    remote, local = RemoteVAE(f"{service.url}/{key}"), service.model(key)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for _ in range(2):
        ours, theirs = remote.encode(pixels)[0], local.encode(pixels)[0]
        assert_same(getattr(ours, "parameters", ours), getattr(theirs, "parameters", theirs))
    warnings = [record.getMessage() for record in caplog.records if record.name == "remote_vae"]
    assert len(warnings) == 1
    assert warnings[0].startswith(
        f"pixels of shape {list(shape)} do not fit this VAE: it encodes heights and widths in"
    )


@pytest.mark.parametrize(("key", "shape"), [("sana", (1, 3, 60, 68)), ("wan-2.2", (1, 3, 9, 65, 65))])
def test_sizes_that_the_local_class_refuses(service: Service, key: str, shape: tuple[int, ...]) -> None:
    pixels = torch.zeros(shape)
    with pytest.raises((RuntimeError, ValueError)) as local:
        service.model(key).encode(pixels)
    with pytest.raises(RemoteVAEError, match=r"422 this model cannot encode `shape` \[1, 3") as remote:
        RemoteVAE(f"{service.url}/{key}").encode(pixels)
    assert str(remote.value).endswith(str(local.value))


def test_fused_projections(service: Service) -> None:
    """Test that the pipeline's calls change nothing."""
    case = next(case for case in CASES if case.pipeline == "StableDiffusionXLPipeline")
    pipe = make(case, RemoteVAE(f"{service.url}/{case.key}"))
    expected = run(pipe, case)[0]
    pipe.vae.fuse_qkv_projections()
    assert_same(run(pipe, case)[0], expected)
    pipe.vae.unfuse_qkv_projections()
    pipe.fuse_qkv_projections(unet=False)
    assert_same(run(pipe, case)[0], expected)
    pipe.unfuse_qkv_projections(unet=False)


def test_decoding_while_the_next_is_generated(service: Service) -> None:
    """Run the queue from the announcement of Hugging Face's remote VAE pilot of 2025."""
    remote = RemoteVAE(f"{service.url}/flux")
    pipe = make(FLUX, service.model("flux"))
    expected = [run(pipe, FLUX, num_inference_steps=count)[0] for count in (1, 2, 3)]
    pipe.vae = None
    pending = []
    for count in (1, 2, 3):
        latents = torch.stack(run(pipe, FLUX, num_inference_steps=count, output_type="latent"))
        pending.append(remote.decode_async(latents, height=64, width=64))
    images = [image for future in pending for image in future.result()]
    assert all(isinstance(image, Image.Image) for image in images)
    assert_same(np.stack(images), np.stack(expected))


def test_a_video_while_the_next_is_generated(service: Service) -> None:
    case = next(case for case in CASES if case.pipeline == "WanPipeline")
    remote = RemoteVAE(f"{service.url}/wan-2.1")
    pipe = make(case, service.model("wan-2.1"))
    latents = torch.stack(run(pipe, case, output_type="latent"))[None]
    latents = latents if latents.shape[1] == 16 else latents.movedim(1, 2)
    (frames,) = remote.decode_async(latents).result()
    assert_same(np.stack(frames), np.stack(run(pipe, case)))
    assert remote.decode_async(latents, output_type="mp4").result()[4:8] == b"ftyp"


def test_an_error_is_raised_by_the_future(service: Service) -> None:
    remote = RemoteVAE(f"{service.url}/flux")
    future = remote.decode_async(torch.randn(1, 16, 64))
    with pytest.raises(Exception, match=r"422 `shape` \[1, 16, 64\] is no shape of this VAE's latents"):
        future.result()
