"""The code that calls a model's endpoint. `make deploy` prints it and writes it into the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handlers import MODELS
from handlers.model import Model
from scripts.models import gives_raw_latents, scaling_factors

SIZE = 512
"""Height and width, in pixels, of the image that the code decodes."""
LATENT_FRAMES = 3
"""Latent frames of a video."""


def calling_code(addresses: Mapping[str, str]) -> str:
    """Return Markdown with the code for each model at its URL."""
    return "\n".join(
        f"{key}, with a token:\n\n```python\n{token_snippet(MODELS[key], address)}```\n\n"
        "With diffusers. Its `remote_decode` sends no token, so it needs an endpoint with ACCESS=public:\n\n"
        f"```python\n{diffusers_snippet(MODELS[key], address)}```\n"
        for key, address in addresses.items()
    )


def diffusers_snippet(model: type[Model], url: str) -> str:
    """Return code with diffusers' client. A parameter without an argument goes into the URL."""
    sent, save = sent_parameters(model), 'decoded.save("decoded.jpg")'
    in_url = [f"{name}={sent.pop(name)}" for name in ("num_frames", "normalized") if name in sent]
    url += f"?{'&'.join(in_url)}" if in_url else ""
    if sent.get("do_scaling"):  # the default of remote_decode
        del sent["do_scaling"]
    if model.kind == "video":
        sent |= {"output_type": "mp4", "return_type": "mp4"}
        save = 'with open("decoded.mp4", "wb") as file:\n    file.write(decoded)'
    elif model.pixel_channels == 4:  # JPEG has no transparency
        sent["image_format"], save = "png", 'decoded.save("decoded.png")'
    arguments = "".join(f", {name}={literal(value)}" for name, value in sent.items())
    return f"""\
import torch
from diffusers.utils.remote_utils import remote_decode

latents = torch.randn({latents_shape(model)}, dtype=torch.float16)  # yours come from a pipeline
decoded = remote_decode("{url}", latents{arguments})
{save}
"""


def token_snippet(model: type[Model], url: str) -> str:
    """Return code that sends a token, for an endpoint of any access."""
    sent, accept, file = {"output_type": "pil", "image_format": "png"}, "image/png", "decoded.png"
    if model.kind == "video":
        sent, accept, file = {"output_type": "mp4"}, "text/plain", "decoded.mp4"
    sent = {"dtype": "float16", **sent_parameters(model), **sent}
    parameters = ", ".join(f'"{name}": {literal(value)}' for name, value in sent.items())
    return f"""\
import requests
import torch
from huggingface_hub import get_token

latents = torch.randn({latents_shape(model)}, dtype=torch.float16)  # yours come from a pipeline
parameters = {{"shape": list(latents.shape), {parameters}}}
headers = {{
    "Authorization": f"Bearer {{get_token()}}",
    "Content-Type": "tensor/binary",
    "Accept": "{accept}",
    "X-Scale-Up-Timeout": "600",  # waits while an endpoint starts
}}
body = latents.numpy().tobytes()
response = requests.post("{url}", body, params=parameters, headers=headers, timeout=660)
if not response.ok:
    raise RuntimeError(response.text)
with open("{file}", "wb") as file:
    file.write(response.content)
"""


def literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def latents_shape(model: type[Model]) -> list[int]:
    """Return the shape of latents as the model's pipelines give them, for one image or a few frames."""
    side, channels, patch = SIZE // model.vae_scale_factor, model.latent_channels, model.patch
    frames = [latent_frames(model)] if model.kind == "video" else []
    if model.pipeline_layout == "packed":
        return [1, sum(frames or [1]) * (side // patch) ** 2, channels * patch**2]
    if model.pipeline_layout == "BFCHW":
        return [1, *frames, channels, side, side]
    return [1, channels, *frames, side, side]


def latent_frames(model: type[Model]) -> int:
    """Return the latent frames of the video that the code decodes: a few, or a clip and its overlap."""
    return LATENT_FRAMES if model.clip is None else model.clip + 2


def sent_parameters(model: type[Model]) -> dict[str, Any]:
    """Return the parameters that a client sends with the pipeline's latents."""
    sent: dict[str, Any] = {"height": SIZE, "width": SIZE} if model.pipeline_layout == "packed" else {}
    if sent and model.kind == "video":
        sent["num_frames"] = model.decoded_frames(latent_frames(model))
    if gives_raw_latents(model):
        return sent | {"do_scaling": False}
    if model.takes_scaled and model.raw_layouts:  # the pipeline's own are raw
        sent["normalized"] = "true"
    return sent | (scaling_factors(model) or {"do_scaling": True})
