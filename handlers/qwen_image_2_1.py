from handlers.base import EndpointHandler
from handlers.model import Peak


class QwenImage21(EndpointHandler):
    """Qwen-Image 2.1: images with transparency. Its VAE has 64 channels."""

    checkpoint = "Qwen/Qwen-Image-2.1"
    subfolder = "vae"
    vae_class = "AutoencoderKLQwenImage21"
    diffusers = "0.41"
    dtype = "bfloat16"
    pixel_channels = 4
    latent_channels = 64
    vae_scale_factor = 16
    pipeline_layout = "packed"
    patch = 1
    peak = {"decode": Peak(2600), "encode": Peak(870)}
    usual_size = (1328, 1328)
    instance = "nvidia-l4"
    license_link = "https://huggingface.co/Qwen/Qwen-Image-2.1"
    weights_mb = 675
