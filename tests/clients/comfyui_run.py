"""Workflows in a real ComfyUI, through its HTTP API, each with the VAE of an endpoint and with a local one.

    python -m tests.clients.comfyui_run /path/to/ComfyUI --python /path/to/its/venv/bin/python

That Python needs ComfyUI's requirements, diffusers and `remote_vae`. The script compares the small checkpoints of the
tests with diffusers' VAE, and random weights of the published sizes with ComfyUI's own VAE. It prints a table.
"""

from __future__ import annotations

import io
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import requests
import torch
import typer
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from PIL import Image
from safetensors.torch import load, load_file, save, save_file
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from handlers import MODELS
from scripts.local_server import ROOT, free_port, serve
from tests.support.checkpoints import checkpoint
from tests.support.small_service import running_service

SMALL = ("tiny", "sd-v1", "flux", "wan-2.1")
PUBLISHED = ("sd-v1", "flux", "wan-2.1")
SIZE = 192
"""Height and width in pixels: several tiles of 128."""
FRAMES = 5

WAN = """
import sys, torch
from safetensors.torch import save_file
import comfy.options
comfy.options.enable_args_parsing()
from comfy.ldm.wan.vae import WanVAE
torch.manual_seed(0)
model = WanVAE(dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
               temperal_downsample=[False, True, True], dropout=0.0)
state = {name: torch.ones_like(value) if "gamma" in name else torch.randn_like(value) * 0.02 if value.ndim == 1 else
         torch.randn_like(value) / (value[0].numel() ** 0.5) for name, value in model.state_dict().items()}
save_file(state, FILE)
"""
"""Code that saves random weights under the names of Wan's authors, which ComfyUI uses and diffusers converts."""


class ComfyUI:
    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder

    def run(self, nodes: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Run a workflow. Return its images, uint8 `[B, H, W, 3]`, and its latents."""
        identity = self._post("/prompt", {"prompt": nodes})["prompt_id"]
        while not (history := requests.get(f"{self.url}/history/{identity}", timeout=10).json()):
            time.sleep(0.1)
        status = history[identity]["status"]
        if status["status_str"] != "success":
            raise RuntimeError(str(status["messages"])[-3000:])
        results: dict[str, torch.Tensor] = {}
        for outputs in history[identity]["outputs"].values():
            for kind, files in outputs.items():
                contents = [requests.get(f"{self.url}/view", params=file, timeout=10).content for file in files]
                if kind == "images":
                    images = [np.asarray(Image.open(io.BytesIO(content))) for content in contents]
                    results["images"] = torch.from_numpy(np.stack(images))
                elif kind == "latents":
                    results["latents"] = load(contents[0])["latent_tensor"]
        return results

    def has(self, node: str) -> bool:
        return bool(requests.get(f"{self.url}/object_info/{node}", timeout=30).json())

    def _post(self, path: str, body: Any) -> Any:
        response = requests.post(self.url + path, json=body, timeout=10)
        assert response.ok, response.text
        return response.json()


@contextmanager
def comfyui(checkout: Path, python: Path, folder: Path) -> Iterator[ComfyUI]:
    """Start ComfyUI with its own folders, the project's node and the local one."""
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "remote-vae").symlink_to(ROOT / "clients" / "comfyui")
    (folder / "custom_nodes" / "local_vae.py").symlink_to(ROOT / "tests" / "clients" / "local_vae.py")
    port, log = free_port(), (folder / "comfyui.log").open("w")
    command = [python, checkout / "main.py", "--cpu", "--port", str(port), "--base-directory", folder]
    environment = {**os.environ, "REMOTE_VAE_ENDPOINTS": "", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*command, "--disable-api-nodes"], stdout=log, stderr=log, cwd=checkout, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            time.sleep(0.2)
            try:
                requests.get(url + "/system_stats", timeout=5)
                break
            except requests.ConnectionError:
                assert process.poll() is None, (folder / "comfyui.log").read_text()
        yield ComfyUI(url, folder)
    finally:
        process.terminate()
        process.wait(20)


def save_published(key: str, folder: Path, file: Path, checkout: Path, python: Path) -> None:
    """Save random weights of the published size: a folder for the service, and a file for ComfyUI's Load VAE."""
    torch.manual_seed(0)
    if key == "wan-2.1":
        environment = {**os.environ, "PYTHONPATH": f"{checkout}:{os.environ.get('PYTHONPATH', '')}"}
        subprocess.run([python, "-c", WAN.replace("FILE", repr(str(file))), "--cpu"], env=environment, check=True)
        state = load_file(file)
        vae = diffusers.AutoencoderKLWan()
        vae.load_state_dict(convert_wan_vae_to_diffusers(dict(state)))
        decoded = vae.decode(torch.randn(1, 16, 1, 8, 8)).sample
        for name in ("decoder.head.2.weight", "decoder.head.2.bias"):
            state[name] = state[name] / decoded.abs().max() / 1.5  # diffusers clamps to [-1, 1]
        vae.load_state_dict(convert_wan_vae_to_diffusers(dict(state)))
        save_file(state, file)
    else:
        vae = diffusers.AutoencoderKL.from_config(MODELS[key].published_config)
        decoded = vae.decode(torch.randn(1, vae.config.latent_channels, 8, 8)).sample
        vae.decoder.conv_out.weight.div_(decoded.std())
        save_file(vae.state_dict(), file)
    vae.save_pretrained(folder)


def save_images(folder: Path) -> None:
    """Save crops of a photograph, and one with a hole for inpainting."""
    photograph = Image.fromarray(data.astronaut())
    for index in range(FRAMES):
        photograph.crop((150 + 4 * index, 0, 150 + 4 * index + SIZE, SIZE)).save(folder / f"{index}.png")
    hole = Image.open(folder / "0.png").convert("RGBA")
    hole.putalpha(
        Image.fromarray(np.where(np.add.outer(*[abs(np.arange(SIZE) - 80)] * 2) < 60, 0, 255).astype("uint8"))
    )
    hole.save(folder / "hole.png")


def workflows(loader: dict[str, Any], key: str, selects: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield workflows by the name of their VAE node, and those with Select VAE Device before it if `selects`."""
    video = MODELS[key].kind == "video"
    identity = count(10)
    images: dict[str, Any] = {"2": {"class_type": "LoadImage", "inputs": {"image": "0.png"}}}
    last = ["2", 0]
    for index in range(1, FRAMES if video else 1):
        image, batch = str(next(identity)), str(next(identity))
        images[image] = {"class_type": "LoadImage", "inputs": {"image": f"{index}.png"}}
        images[batch] = {"class_type": "ImageBatch", "inputs": {"image1": last, "image2": [image, 0]}}
        last = [batch, 0]
    latents = {"2": {"class_type": "LoadLatent", "inputs": {"latent": f"{key}.latent"}}}
    hole = {"2": {"class_type": "LoadImage", "inputs": {"image": "hole.png"}}}
    tiles = {"tile_size": 128, "overlap": 32, "temporal_size": 8, "temporal_overlap": 4}
    to_vae, to_image, to_latents = {"vae": ["1", 0]}, {"images": ["3", 0]}, {"samples": ["3", 0]}
    for name, source, inputs in (
        ("VAEDecode", latents, {"samples": ["2", 0]}),
        ("VAEDecodeTiled", latents, {"samples": ["2", 0], **tiles}),
        ("VAEEncode", images, {"pixels": last}),
        ("VAEEncodeTiled", images, {"pixels": last, **tiles}),
        *([] if video else [("VAEEncodeForInpaint", hole, {"pixels": ["2", 0], "mask": ["2", 1], "grow_mask_by": 6})]),
    ):
        nodes = {"1": loader, **source, "3": {"class_type": name, "inputs": {**inputs, **to_vae}}}
        prefix = {"filename_prefix": f"{key}-{name}"}
        if "Decode" in name:
            nodes["4"] = {"class_type": "SaveImage", "inputs": {**to_image, **prefix}}
        else:
            nodes["4"] = {"class_type": "SaveLatent", "inputs": {**to_latents, **prefix}}
            nodes["5"] = {"class_type": "VAEDecode", "inputs": {**to_latents, **to_vae}}
            nodes["6"] = {"class_type": "SaveImage", "inputs": {"images": ["5", 0], **prefix}}
        yield name, nodes
        if selects and name in ("VAEDecode", "VAEEncode"):
            select = {"class_type": "SelectVAEDevice", "inputs": {**to_vae, "device": "default"}}
            inputs = {**nodes["3"]["inputs"], "vae": ["7", 0]}
            yield f"selected {name}", {**nodes, "7": select, "3": {"class_type": name, "inputs": inputs}}


def compare(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """Return the PSNR and the largest difference. The range is 255 for pixels, and the latents' own for latents."""
    values, reference = actual.double().numpy(), expected.double().numpy()
    data_range = 255 if actual.dtype == torch.uint8 else float(reference.max() - reference.min())
    with np.errstate(divide="ignore"):  # equal values have an infinite PSNR
        psnr = peak_signal_noise_ratio(reference, values, data_range=data_range)
    return f"{tuple(actual.shape)} {psnr:.1f} dB, at most {np.abs(values - reference).max():.2g}"


@torch.no_grad()
def main(
    checkout: Annotated[Path, typer.Argument(help="Folder of ComfyUI.")],
    python: Annotated[Path, typer.Option(help="Python that runs it.")],
    model: Annotated[list[str], typer.Option(help="Model to compare. Repeat it for several.")] = list(SMALL),  # noqa: B006
) -> None:
    published = [key for key in PUBLISHED if key in model]
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        (base / "input").mkdir()
        (base / "models" / "vae").mkdir(parents=True)
        (base / "large").mkdir()
        save_images(base / "input")
        for key in model:
            frames = (2,) if MODELS[key].kind == "video" else ()
            side = SIZE // MODELS[key].vae_scale_factor
            torch.manual_seed(0)
            latents = torch.randn(1, MODELS[key].latent_channels, *frames, side, side)
            (base / "input" / f"{key}.latent").write_bytes(
                save({"latent_tensor": latents, "latent_format_version_0": torch.tensor([])})
            )
        for key in published:
            file = base / "models" / "vae" / f"{key}.safetensors"
            save_published(key, base / "large" / key, file, checkout, python)
        command = ("-m", "tests.support.models_server")
        with (
            running_service(base / "checkpoints", base / "checkpoints.log") as service,
            serve("--folder", str(base / "large"), log=base / "large.log", command=command) as large,
            comfyui(checkout, python, base) as comfy,
        ):
            local = [("LocalVAE", {"folder": str(checkpoint(base / "checkpoints", key))}) for key in model]
            own = [("VAELoader", {"vae_name": f"{key}.safetensors"}) for key in published]
            urls = [f"{service.url}/{key}" for key in model] + [f"{large}/{key}" for key in published]
            selects = comfy.has("SelectVAEDevice")
            for key, url, (kind, inputs) in zip((*model, *published), urls, (*local, *own), strict=True):
                remote = {"class_type": "RemoteVAELoader", "inputs": {"url": url}}
                local_loader = {"class_type": kind, "inputs": inputs}
                for (node, workflow), (_, local_workflow) in zip(
                    workflows(remote, key, selects), workflows(local_loader, key, selects), strict=True
                ):
                    actual, expected = comfy.run(workflow), comfy.run(local_workflow)
                    for name in expected:
                        row = f"{key:8} {kind:10} {node:20} {name:9}"
                        print(row, compare(actual[name], expected[name]), flush=True)


if __name__ == "__main__":
    typer.run(main)
