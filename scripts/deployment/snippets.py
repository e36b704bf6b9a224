"""The code that calls an endpoint, ready to paste."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

from handlers.model import Model
from scripts.models import gives_raw_latents, scaling_factors

SIZE = 512
"""Pixels, height and width, of the picture that the snippets decode."""
LATENT_FRAMES = 3
"""Of a video."""


def diffusers_snippet(model: type[Model], url: str) -> str:
    """With the released client, for a public endpoint. What it has no argument for goes into the address."""
    sent = _parameters(model, released=True)
    if "num_frames" in sent:
        url += f"?num_frames={sent.pop('num_frames')}"
    arguments = ", ".join(["", *(f"{name}={value}" for name, value in sent.items())])
    if model.kind == "video":
        return dedent(f"""\
            from pathlib import Path

            import torch
            from diffusers.utils.remote_utils import remote_decode

            latents = torch.randn({latents_shape(model)}, dtype=torch.float16)  # yours come from a pipeline
            video = remote_decode("{url}", latents{arguments}, output_type="mp4", return_type="mp4")
            Path("decoded.mp4").write_bytes(video)
            """)
    return dedent(f"""\
        import torch
        from diffusers.utils.remote_utils import remote_decode

        latents = torch.randn({latents_shape(model)}, dtype=torch.float16)  # yours come from a pipeline
        image = remote_decode("{url}", latents{arguments})
        image.save("decoded.jpg")
        """)


def token_snippet(model: type[Model], url: str) -> str:
    """With the token, for an endpoint of any access: `remote_decode` sends none."""
    sent = "".join(f'"{name}": {value}, ' for name, value in _parameters(model, released=False).items())
    if model.kind == "video":
        output, accept, name = '"output_type": "mp4"', "text/plain", "decoded.mp4"
    else:
        output, accept, name = '"output_type": "pil", "image_format": "png"', "image/png", "decoded.png"
    return dedent(f"""\
        from pathlib import Path

        import requests
        import torch
        from huggingface_hub import get_token

        latents = torch.randn({latents_shape(model)}, dtype=torch.float16)  # yours come from a pipeline
        response = requests.post(
            "{url}",
            data=latents.numpy().tobytes(),
            params={{"shape": list(latents.shape), "dtype": "float16", {sent}{output}}},
            headers={{
                "Authorization": f"Bearer {{get_token()}}",
                "Content-Type": "tensor/binary",
                "Accept": "{accept}",
                "X-Scale-Up-Timeout": "600",  # waits for an endpoint that has scaled to zero
            }},
            timeout=660,
        )
        if not response.ok:
            raise RuntimeError(response.text)
        Path("{name}").write_bytes(response.content)
        """)


def latents_shape(model: type[Model]) -> list[int]:
    """As the model's pipelines lay them out: of one picture, or of a few frames."""
    side, channels, patch = SIZE // model.vae_scale_factor, model.latent_channels, model.patch
    frames = LATENT_FRAMES if model.kind == "video" else 1
    shapes = {
        "packed": [1, frames * (side // patch) ** 2, channels * patch**2],
        "BFCHW": [1, frames, channels, side, side],
    }
    if layout := pipeline_layout(model):
        return shapes[layout]
    return [1, channels, *([frames] if model.kind == "video" else []), side, side]


def pipeline_layout(model: type[Model]) -> str | None:
    """The layout of the pipelines' latents where it is not the VAE's own."""
    return model.pipeline_layout if model.pipeline_layout in ("packed", "BFCHW") else None


def _parameters(model: type[Model], released: bool) -> dict[str, Any]:
    """What goes along with the pipeline's latents; the released client sends `do_scaling` by itself."""
    sent: dict[str, Any] = {}
    if pipeline_layout(model) == "packed":
        sent |= {"height": SIZE, "width": SIZE}
        if model.kind == "video":
            sent["num_frames"] = (LATENT_FRAMES - 1) * model.frame_factor + 1
    if gives_raw_latents(model):
        return {**sent, "do_scaling": False}
    return sent | (scaling_factors(model) or ({} if released else {"do_scaling": True}))
