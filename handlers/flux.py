from handlers.base import EndpointHandler
from handlers.model import read_config


class Flux(EndpointHandler):
    """FLUX.1, and the models that share its VAE: Chroma, HiDream, Lumina 2, Z-Image."""

    checkpoint = "black-forest-labs/FLUX.1-schnell"
    subfolder = "vae"
    vae_class = "AutoencoderKL"
    dtype = "bfloat16"
    latent_channels = 16
    pipeline_layout = "packed"
    latents_layouts = unshifted_layouts = ("BFHWC",)  # from Kandinsky 5, which does not apply the shift
    instance = "nvidia-l4"  # 2.2 GB of 24, in bfloat16, which a T4 does not compute
    license = "apache-2.0"
    license_link = "https://huggingface.co/black-forest-labs/FLUX.1-schnell/blob/main/LICENSE.md"
    weights_mb = 168
    shared_by = "Chroma, HiDream, Lumina 2, Z-Image, Kandinsky 5 image"
    published_config = read_config("flux")
