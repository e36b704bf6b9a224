from handlers.base import EndpointHandler
from handlers.model import read_config


class StableDiffusion3(EndpointHandler):
    """Stable Diffusion 3 and 3.5."""

    checkpoint = "stabilityai/stable-diffusion-3.5-medium"
    subfolder = "vae"
    vae_class = "AutoencoderKL"
    dtype = "float16"
    latent_channels = 16
    instance = "nvidia-t4"  # 2.2 GB of 14
    license = "stabilityai-ai-community"
    license_link = "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md"
    weights_mb = 168
    shared_by = "Stable Diffusion 3 medium, 3.5 medium and large"
    published_config = read_config("sd3")
