from typing import ClassVar

from handlers.flux2 import Flux2
from handlers.model import Peak


class Taef2(Flux2):
    """Previews of FLUX.2's images in milliseconds. It takes scaled latents alone: those of each step of a pipeline."""

    checkpoint = "madebyollin/taef2"
    subfolder: ClassVar[str | None] = None
    file: ClassVar[str | None] = "taef2.safetensors"
    vae_class = "handlers.serving.vae.taef2:TinyFlux2Autoencoder"
    dtype = "float16"
    takes_scaled = True
    tiles = ()
    peak = {"decode": Peak(195), "encode": Peak(200)}
    instance = "nvidia-t4"  # 0.5 GB of 14
    license = "mit"
    license_link = "https://huggingface.co/madebyollin/taef2"
    weights_mb = 11
    published_config = {}
