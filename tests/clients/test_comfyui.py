"""Tests of ComfyUI's node: its VAE returns the results of diffusers in ComfyUI's layout.

A stand-in replaces ComfyUI's code around the model of its VAE. `comfyui_run.py` runs the real one.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from handlers import MODELS
from handlers.serving.vae.autoencoder import PixelRange
from handlers.version import VERSION
from remote_vae import RemoteVAEError
from scripts.local_server import ROOT
from tests.support.faulty_proxy import faulty_proxy
from tests.support.small_service import SERVED, Service

STAND_IN = Path(__file__).parent / "comfyui_stand_in"
TOKEN = "hf_theTokenThatNobodyMaySee"
TAESD = {"taesd": (0.18215, 0), "taesdxl": (0.13025, 0), "taesd3": (1.5305, 0.0609), "taef1": (0.3611, 0.1159)}
SMALL = [key for key in MODELS if key in (*SERVED, "tiny")]
VIDEOS = [key for key in SMALL if MODELS[key].kind == "video" and key not in ("svd", "taew2.1", "minimax-h3")]
"""Models of videos. ComfyUI takes SVD's as a batch of images, has TAEHV's itself, and MiniMax-H3 has a test."""
IMAGES = [key for key in SMALL if MODELS[key].kind == "image" or key == "svd"]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Copy the folder into `custom_nodes` as its README says, and load it as ComfyUI does."""
    comfyui = tmp_path_factory.mktemp("comfyui")
    (comfyui / "custom_nodes").mkdir()
    readme = (ROOT / "clients" / "comfyui" / "README.md").read_text()
    copy = re.search(r"^\$ (cp .*?) *(#.*)?$", readme, re.MULTILINE)[1].replace("/path/to/ComfyUI", str(comfyui))
    subprocess.run(shlex.split(copy), cwd=ROOT, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STAND_IN))
        folder = comfyui / "custom_nodes" / "remote-vae"
        spec = importlib.util.spec_from_file_location("custom_node", folder / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "custom_node", module)
        spec.loader.exec_module(module)
        assert (folder / module.WEB_DIRECTORY / "settings.js").exists()
        yield module
        for name in list(sys.modules):
            if name.split(".")[0] in ("custom_node", "comfy", "folder_paths", "nodes"):
                del sys.modules[name]


@pytest.fixture
def load(node: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return the node's function in the form that a workflow calls, with no settings."""
    for name in ("REMOTE_VAE_ENDPOINTS", "REMOTE_VAE_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("folder_paths.user_directory", str(tmp_path))
    cls = node.NODE_CLASS_MAPPINGS["RemoteVAELoader"]
    assert list(cls.INPUT_TYPES()["required"]) == ["url"]  # a workflow stores nothing else
    return lambda url: getattr(cls(), cls.FUNCTION)(url=url)[0]


def random_image(*shape: int) -> Tensor:
    """Return an image in the format of LoadImage."""
    return torch.rand(*shape, 3, generator=torch.Generator().manual_seed(0))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def to_raw(key: str, model: Any, latents: Tensor) -> Tensor:
    """Convert ComfyUI's latents to the input of diffusers' class."""
    if key == "taef2":
        return torch.nn.functional.pixel_shuffle(latents, 2)
    if key.startswith("flux2"):  # [B, 32 * 4, h/2, w/2], normalized by the BatchNorm
        mean, variance = (value.view(1, -1, 1, 1) for value in (model.bn.running_mean, model.bn.running_var))
        latents = latents * (variance + model.config.batch_norm_eps).sqrt() + mean
        return torch.nn.functional.pixel_shuffle(latents, 2)
    if key.startswith("ltx"):
        mean, std = (value.view(1, -1, 1, 1, 1) for value in (model.latents_mean, model.latents_std))
        return latents * std + mean
    scale, shift = TAESD.get(key, (1, 0))
    return (latents - shift) * scale


def with_frames(key: str, tensor: Tensor) -> Tensor:
    """Add the dimension of frames if diffusers' class has it and ComfyUI's batch does not."""
    return tensor.unsqueeze(2) if key.startswith("qwen-image") and tensor.ndim == 4 else tensor


@torch.no_grad()
def decoded(key: str, model: Any, latents: Tensor) -> Tensor:
    options = {"num_frames": len(latents)} if key == "svd" else {}
    sample = model.decode(to_raw(key, model, latents), **options)[0]
    if key == "wan-2.1-2x":
        sample = torch.nn.functional.pixel_shuffle(sample.movedim(2, 1), 2).movedim(1, 2)
    return ((sample + 1) / 2).clamp(0, 1).movedim(1, -1)


@torch.no_grad()
def encoded(model: Any, pixels: Tensor) -> Tensor:
    output = model.encode(pixels * 2 - 1)
    if isinstance(output, tuple):
        return output[0]
    return output.latent_dist.mode() if "latent_dist" in output else output[0]


@pytest.mark.parametrize("key", IMAGES)
def test_images(key: str, service: Service, load: Callable[[str], Any]) -> None:
    """Test VAE Decode and VAE Encode. ComfyUI crops the middle of an image whose size the VAE cannot take."""
    model, vae = service.model(key), load(f"{service.url}/{key}")
    is_flux2, has_frames = key in ("flux2", "flux2-small", "taef2"), key.startswith("qwen-image")
    channels = 128 if is_flux2 else MODELS[key].latent_channels
    side = 16 if is_flux2 else MODELS[key].vae_scale_factor
    assert (vae.latent_channels, vae.spacial_compression_encode()) == (channels, side)
    latents = with_frames(key, noise(1 if has_frames else 2, channels, 2, 3))
    pixels = vae.decode(latents)
    assert pixels.shape[-1] == vae.output_channels == MODELS[key].pixel_channels
    assert torch.allclose(pixels, decoded(key, model, latents), atol=1e-5)
    pixels = random_image(2, 2 * side + 3, 3 * side)
    cropped = with_frames(key, pixels[:, 1:-2].movedim(-1, 1))
    if MODELS[key].pixel_channels == 4:  # LoadImage gives no alpha
        cropped = torch.cat([cropped, torch.ones_like(cropped[:, :1])], 1)
    latents = vae.encode(pixels)
    assert latents.shape[:2] == (2, channels)
    assert latents.shape[-2:] == (2, 3)
    assert torch.allclose(to_raw(key, model, latents), encoded(model, cropped), atol=1e-4)


@pytest.mark.parametrize("key", VIDEOS)
def test_videos(key: str, service: Service, load: Callable[[str], Any]) -> None:
    """Test that frames that do not fill a latent frame are dropped. ComfyUI's own VAEs drop or refuse them."""
    model, vae = service.model(key), load(f"{service.url}/{key}")
    side, each = MODELS[key].vae_scale_factor, MODELS[key].frame_factor
    assert vae.temporal_compression_decode() == each
    latents = noise(1, vae.latent_channels, 2, 2, 2)
    pixels = vae.decode(latents)
    assert pixels.shape[1] == vae.upscale_ratio[0](2)
    assert pixels.shape[2:4] == (2 * vae.upscale_ratio[1],) * 2 == (2 * side * MODELS[key].upscale,) * 2
    assert torch.allclose(pixels, decoded(key, model, latents), atol=1e-5)
    few = 3 if MODELS[key].padding_frames else 2  # CogVideoX takes latents in pairs after the first
    count = 1 + (few - 1) * each
    frames = random_image(count + 2, 2 * side, 2 * side)
    latents = vae.encode(frames)
    assert latents.shape[2] == vae.downscale_ratio[0](len(frames)) == few
    expected = encoded(model, frames[:count].movedim(-1, 0).unsqueeze(0))
    assert torch.allclose(to_raw(key, model, latents), expected, atol=1e-4)


@pytest.mark.skipif("minimax-h3" not in SERVED, reason="the installed diffusers has no MiniMax-H3")
def test_minimax_h3(service: Service, load: Callable[[str], Any]) -> None:
    """Test clips, and latents that are normalized in ComfyUI."""
    model, vae = service.model("minimax-h3"), load(f"{service.url}/minimax-h3")
    latents = noise(1, 24, 7, 4, 4)
    mean, std = (torch.tensor(model.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    pixel_range = PixelRange(MODELS["minimax-h3"].pixel_statistics)
    with torch.no_grad():
        expected = pixel_range.from_own(model.decode(latents * std + mean).sample)
    decoded = ((expected + 1) / 2).clamp(0, 1).movedim(1, -1)
    assert torch.allclose(vae.decode(latents), decoded, atol=1e-5)
    frames = random_image(26, 64, 64)
    assert vae.encode(frames).shape == (1, 24, vae.downscale_ratio[0](26), 4, 4) == (1, 24, 7, 4, 4)


@pytest.mark.parametrize("key", ["flux", "flux2", "qwen-image", "wan-2.1"])
def test_tiles(key: str, service: Service, load: Callable[[str], Any]) -> None:
    """Test VAE Decode (Tiled): the ratios determine the position of a decoded tile."""
    model, vae = service.model(key), load(f"{service.url}/{key}")
    frames = () if vae.latent_dim == 2 else (2 if key == "wan-2.1" else 1,)
    latents = noise(1, vae.latent_channels, *frames, 4, 3)
    tiles = [[decoded(key, model, tile) for tile in row.split(2, -1)] for row in latents.split(2, -2)]
    expected = torch.cat([torch.cat(row, -2) for row in tiles], -3)
    assert torch.allclose(vae.decode_tiled(latents, 2), expected, atol=1e-5)


def test_ltx_video_with_a_timestep(service: Service, load: Callable[[str], Any]) -> None:
    """Test that ComfyUI adds noise from torch's generator from 0.9.1 on, and decodes at timestep 0.05."""
    model, vae = service.model("ltx-video-0.9.5"), load(f"{service.url}/ltx-video-0.9.5")
    latents = noise(1, 128, 2, 2, 2)
    torch.manual_seed(1)
    pixels = vae.decode(latents)
    torch.manual_seed(1)
    noisy = torch.randn_like(latents) * 0.025 + latents * 0.975
    sample = model.decode(to_raw("ltx", model, noisy), temb=torch.tensor([0.05])).sample
    assert torch.allclose(pixels, ((sample + 1) / 2).clamp(0, 1).movedim(1, -1), atol=1e-5)


@pytest.mark.parametrize("key", ["tiny", "wan-2.1"])
def test_another_device_is_selected(key: str, service: Service, load: Callable[[str], Any]) -> None:
    """Select a device as Select VAE Device does: it gets the model of a copy from the patcher."""
    vae = load(f"{service.url}/{key}")
    selected = copy.copy(vae)
    selected.patcher = vae.patcher.clone()
    selected.first_stage_model = selected.patcher.model
    side = MODELS[key].vae_scale_factor
    latents = selected.encode(random_image(1, 2 * side, 2 * side))
    assert latents.shape[1] == MODELS[key].latent_channels
    assert torch.equal(latents, vae.encode(random_image(1, 2 * side, 2 * side)))
    assert torch.equal(selected.decode(latents), vae.decode(latents))


@pytest.mark.parametrize("key", SMALL)
def test_ltx_statistics(key: str, service: Service, load: Callable[[str], Any]) -> None:
    """Convert normalized latents to raw latents and back, as LTXVLatentUpsampler does."""
    remote = load(f"{service.url}/{key}").first_stage_model
    if not key.startswith("ltx"):
        assert not hasattr(remote, "per_channel_statistics")
        return
    statistics, latents = remote.per_channel_statistics, noise(1, 128, 2, 2, 2)
    raw = statistics.un_normalize(latents)
    assert torch.allclose(raw, to_raw(key, service.model(key), latents))
    assert not torch.allclose(raw, latents)
    assert torch.allclose(statistics.normalize(raw), latents, atol=1e-5)
    assert statistics.un_normalize(latents.bfloat16()).dtype == torch.bfloat16


def test_the_category_equals_load_vaes(node: ModuleType, load: Callable[[str], Any]) -> None:
    assert node.NODE_CLASS_MAPPINGS["RemoteVAELoader"].CATEGORY == "model/loaders"


def test_a_batch_larger_than_one_request(service: Service, load: Callable[[str], Any]) -> None:
    vae = load(f"{service.url}/tiny")
    vae.first_stage_model.latents.config["limits"]["max_batch"] = 2
    latents = noise(5, 8, 2, 2)
    assert torch.allclose(vae.decode(latents), decoded("tiny", service.model("tiny"), latents), atol=1e-5)


def test_the_registrys_metadata() -> None:
    """Check the metadata against https://docs.comfy.org/registry/specifications."""
    metadata = tomllib.loads((ROOT / "clients" / "comfyui" / "pyproject.toml").read_text())
    project = metadata["project"]
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", project["name"])
    assert project["version"] == VERSION
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert metadata["tool"]["comfy"].keys() == {"PublisherId", "DisplayName"}


def test_the_vae_cannot_be_saved(service: Service, load: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="cannot be saved"):
        load(f"{service.url}/tiny").get_sd()


def test_the_token_is_sent_only_to_the_users_own_endpoints(
    service: Service, load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test a workflow of another person, which may contain any address."""
    settings = tmp_path / "default" / "comfy.settings.json"
    settings.parent.mkdir()
    with faulty_proxy(f"{service.url}/tiny") as faulty, faulty_proxy(f"{service.url}/tiny") as other:
        faulty.token = other.token = TOKEN
        settings.write_text(json.dumps({"RemoteVAE.Endpoints": f"{faulty.url}/ http://mine", "RemoteVAE.Token": TOKEN}))
        for url in ("", faulty.url, f" {faulty.url}/"):
            assert load(url).decode(noise(1, 8, 2, 2)).shape == (1, 8, 8, 3)
        with pytest.raises(RemoteVAEError, match="this one is not among them"):
            load(other.url)
        assert not any("Authorization" in headers for *_, headers in other.seen)
        monkeypatch.setenv("REMOTE_VAE_ENDPOINTS", other.url)
        assert load(other.url).latent_channels == 8
        monkeypatch.setenv("REMOTE_VAE_TOKEN", "hf_another")
        with pytest.raises(RemoteVAEError, match="your token is not accepted") as error:
            load("")
    assert "hf_another" not in str(error.value)


def test_no_address(load: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="set the URL of an endpoint"):
        load(" ")


@pytest.mark.parametrize("starts", [True, False])
def test_cancel_ends_the_wait(starts: bool, load: Callable[[str], Any], service: Service) -> None:
    """Cancel while an endpoint starts, and while it does not respond. No retrying thread may remain."""
    import comfy.model_management as management

    with faulty_proxy(f"{service.url}/tiny") as faulty:
        vae = None if starts else load(faulty.url)
        faulty.starts_until, faulty.hangs = time.monotonic() + (60 if starts else 0), True
        timer = threading.Timer(0.2, lambda: setattr(management, "interrupted", True))
        timer.start()
        with pytest.raises(management.InterruptProcessingException):
            (vae or load(faulty.url)).decode(noise(1, 8, 2, 2))
        assert time.monotonic() < faulty.starts_until or not starts
        timer.join()
    threads = [thread for thread in threading.enumerate() if thread.name == "remote_vae"]
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
