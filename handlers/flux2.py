from typing import ClassVar

from handlers.base import EndpointHandler


class Flux2(EndpointHandler):
    """FLUX.2. A BatchNorm in the VAE normalizes latents in patches of 2x2."""

    checkpoint = "black-forest-labs/FLUX.2-klein-4B"
    subfolder: ClassVar[str | None] = "vae"
    vae_class = "AutoencoderKLFlux2"
    dtype = "bfloat16"
    latent_channels = 32
    pipeline_layout = "packed"
    latents_layouts = ("patchified",)  # from ERNIE-Image
    raw_layouts = ("BCHW",)  # from Flux2KleinPipeline; Bria FIBO 2 uses this layout for normalized latents
    comfyui_latents = "normalized"
    instance = "nvidia-l4"  # 2.2 GB of 24, in bfloat16, which a T4 does not compute
    license = "apache-2.0"
    license_link = "https://huggingface.co/black-forest-labs/FLUX.2-klein-4B"
    weights_mb = 168
    shared_by = "FLUX.2 dev and klein, ERNIE-Image, Bria FIBO 2"
