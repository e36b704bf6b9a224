"""Tests of the blocks for Modular Diffusers, against diffusers' own blocks with a local VAE."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.flux import decoders
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxAutoBlocks
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep
from diffusers.modular_pipelines.wan.decoders import WanVaeDecoderStep
from PIL import Image

from remote_vae import RemoteVAE
from scripts.local_server import ROOT
from tests.support.small_service import Service
from tests.support.values import assert_same

FOLDER = ROOT / "clients" / "modular-diffusers"
IS_PACKED = not hasattr(decoders, "FluxUnpackLatentsStep")
"""True for versions of diffusers whose block for FLUX takes packed latents."""
LATENTS = {
    "flux": (2, 64, 64) if IS_PACKED else (2, 16, 16, 16),
    "sdxl": (1, 4, 16, 16),
    "wan-2.1": (1, 16, 3, 8, 8),
}
LOCAL: dict[str, Any] = {
    "flux": decoders.FluxDecodeStep,
    "sdxl": StableDiffusionXLDecodeStep,
    "wan-2.1": WanVaeDecoderStep,
}


@pytest.fixture(autouse=True)
def modules_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the blocks into a folder of their own, not into that of the user."""
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(folder)


def load(name: str, service: Service, key: str) -> Any:
    return ModularPipelineBlocks.from_pretrained(
        str(FOLDER / name), trust_remote_code=True, endpoint=f"{service.url}/{key}"
    )


def pipeline(block: Any, vae: Any = None) -> Any:
    pipe = SequentialPipelineBlocks.from_blocks_dict({"block": block}).init_pipeline()
    if vae is not None:
        pipe.update_components(vae=vae)
    return pipe


@pytest.mark.parametrize("output_type", ["pil", "np"])
@pytest.mark.parametrize("key", LATENTS)
def test_decoded_images_are_those_of_the_local_block(service: Service, key: str, output_type: str) -> None:
    latents = torch.randn(LATENTS[key], generator=torch.Generator().manual_seed(0))
    output = "videos" if key == "wan-2.1" else "images"
    inputs = {"latents": latents, "output": output, **({"height": 128, "width": 128} if latents.ndim == 3 else {})}
    local = pipeline(LOCAL[key](), service.model(key))(output_type=output_type, **inputs)
    pipe = pipeline(load("decode", service, key))
    remote = pipe(output_type=output_type, **inputs)
    assert len(remote) == len(local) >= 1
    ours, theirs = (np.stack([np.asarray(each) for each in images]) for images in (remote, local))
    assert ours.std() > 0
    assert_same(ours, theirs)
    assert pipe(output_type="latent", **inputs) is latents


@pytest.mark.parametrize("key", ["flux", "wan-2.1"])
def test_encoded_images_are_those_of_the_local_vae(service: Service, key: str) -> None:
    image = Image.radial_gradient("L").convert("RGB").resize((200, 130))
    pipe = pipeline(load("encode", service, key))
    vae = service.model(key)
    pixels = torch.from_numpy(np.array(image.resize((200, 128), Image.Resampling.LANCZOS))).permute(2, 0, 1)[None]
    batch = pixels.float() / 127.5 - 1
    posterior = vae.encode(batch.unsqueeze(2) if key == "wan-2.1" else batch).latent_dist

    def normalized(latents: torch.Tensor) -> torch.Tensor:
        if key == "flux":
            return (latents - vae.config.shift_factor) * vae.config.scaling_factor
        mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        return (latents - mean) / std

    mode = pipe(image=image, sample_mode="argmax", output="image_latents")
    torch.testing.assert_close(mode, normalized(posterior.mode()), atol=1e-4, rtol=1e-4)
    sample = pipe(image=image, generator=torch.Generator().manual_seed(5), output="image_latents")
    seed = int(torch.randint(1 << 31, (1,), generator=torch.Generator().manual_seed(5)))
    expected = normalized(posterior.sample(torch.Generator().manual_seed(seed)))
    torch.testing.assert_close(sample, expected, atol=5e-4, rtol=1e-4)
    both = pipe(image=[image, image.rotate(90)], height=64, width=96, sample_mode="argmax", output="image_latents")
    assert (len(both), *both.shape[-2:]) == (2, 8, 12)


@pytest.mark.parametrize("uint8", [False, True])
def test_a_remote_vae_is_a_component(service: Service, uint8: bool) -> None:
    latents = torch.randn(LATENTS["sdxl"], generator=torch.Generator().manual_seed(0))
    remote = RemoteVAE(f"{service.url}/sdxl", uint8=uint8)
    ours, theirs = (
        pipeline(LOCAL["sdxl"](), vae)(latents=latents, output="images")[0] for vae in (remote, service.model("sdxl"))
    )
    assert_same(ours, theirs)


def test_blocks_replace_those_of_a_pipeline(service: Service) -> None:
    """Test that a whole pipeline's blocks need no VAE for decoding any more."""
    blocks = FluxAutoBlocks()
    blocks.sub_blocks["decode"] = load("decode", service, "flux")
    assert "images" in [output.name for output in blocks.init_pipeline().blocks.outputs]


def test_the_snippet_of_the_page_runs(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (snippet,) = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    variables = {"ENDPOINT": f"{service.url}/flux"}
    exec(snippet, variables)
    assert [image.size for image in variables["images"]] == [(128, 128)]
