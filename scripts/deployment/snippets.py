"""The code that calls an endpoint, ready to paste."""

from __future__ import annotations

from textwrap import dedent

from handlers.base import EndpointHandler
from handlers.serving.layout import vae_scale_factor

SIZE = 512
"""Pixels, height and width, of the picture that the snippets decode."""


def diffusers_snippet(handler: type[EndpointHandler], url: str) -> str:
    """With the released client, for a public endpoint."""
    config = handler.published_config
    scaling = f"scaling_factor={config['scaling_factor']:g}"
    if config.get("shift_factor"):
        scaling += f", shift_factor={config['shift_factor']:g}"
    if handler.kind == "video":
        return dedent(f"""\
            from pathlib import Path

            import torch
            from diffusers.utils.remote_utils import remote_decode

            latents = torch.randn({_latents_shape(handler)}, dtype=torch.float16)  # yours come from a pipeline
            video = remote_decode("{url}", latents, {scaling}, output_type="mp4", return_type="mp4")
            Path("decoded.mp4").write_bytes(video)
            """)
    return dedent(f"""\
        import torch
        from diffusers.utils.remote_utils import remote_decode

        latents = torch.randn({_latents_shape(handler)}, dtype=torch.float16)  # yours come from a pipeline
        image = remote_decode("{url}", latents, {scaling})
        image.save("decoded.jpg")
        """)


def token_snippet(handler: type[EndpointHandler], url: str) -> str:
    """With the token, for an endpoint of any access: `remote_decode` sends none."""
    config = handler.published_config
    scaling = f'"scaling_factor": {config["scaling_factor"]:g}'
    if config.get("shift_factor"):
        scaling += f', "shift_factor": {config["shift_factor"]:g}'
    if handler.kind == "video":
        output, accept, name = '"output_type": "mp4"', "text/plain", "decoded.mp4"
    else:
        output, accept, name = '"output_type": "pil", "image_format": "png"', "image/png", "decoded.png"
    return dedent(f"""\
        from pathlib import Path

        import requests
        import torch
        from huggingface_hub import get_token

        latents = torch.randn({_latents_shape(handler)}, dtype=torch.float16)  # yours come from a pipeline
        response = requests.post(
            "{url}",
            data=latents.numpy().tobytes(),
            params={{"shape": list(latents.shape), "dtype": "float16", {scaling}, {output}}},
            headers={{
                "Authorization": f"Bearer {{get_token()}}",
                "Content-Type": "tensor/binary",
                "Accept": "{accept}",
                "X-Scale-Up-Timeout": "600",  # waits for an endpoint that has scaled to zero
            }},
            timeout=660,
        )
        response.raise_for_status()
        Path("{name}").write_bytes(response.content)
        """)


def _latents_shape(handler: type[EndpointHandler]) -> list[int]:
    config = handler.published_config
    side = SIZE // vae_scale_factor(config)
    frames = [3] if handler.kind == "video" else []
    return [1, config["latent_channels"], *frames, side, side]
