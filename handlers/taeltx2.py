from typing import ClassVar

from handlers.model import Peak, read_config
from handlers.taehv import Taehv


class Taeltx2(Taehv):
    """Previews of videos of LTX-2. It takes scaled latents alone, and the pipeline returns raw ones."""

    file = "taeltx_2.safetensors"
    download: ClassVar[str | None] = "https://github.com/madebyollin/taehv/raw/main/safetensors/taeltx_2.safetensors"
    latent_channels = 128
    vae_scale_factor = 32
    frame_factor = 8
    patch = 1
    raw_layouts = ("BCFHW",)  # from LTX2Pipeline
    comfyui_latents = "normalized"
    peak = {"decode": Peak(56), "encode": Peak(66, 1.5, 9)}
    usual_size = (512, 768, 121)
    shared_by = ""
    published_config = read_config("taeltx2")
