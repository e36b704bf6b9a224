from handlers.base import EndpointHandler
from handlers.model import read_config


class StableDiffusionXL(EndpointHandler):
    """Stable Diffusion XL: the fine-tune whose activations fit in float16. The original overflows to black images."""

    checkpoint = "madebyollin/sdxl-vae-fp16-fix"
    vae_class = "AutoencoderKL"
    dtype = "float16"
    latent_channels = 4
    instance = "nvidia-t4"  # 2.2 GB of 14
    license = "mit"
    license_link = "https://huggingface.co/madebyollin/sdxl-vae-fp16-fix"
    weights_mb = 335
    shared_by = "PixArt-Sigma, AuraFlow, Hunyuan-DiT"
    published_config = read_config("sdxl")
