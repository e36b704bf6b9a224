from handlers.base import EndpointHandler
from handlers.model import Peak


class TaesdXL(EndpointHandler):
    """Previews of Stable Diffusion XL in milliseconds.

    It takes the scaled latents of the diffusion model: send no factor, or `do_scaling`.
    """

    checkpoint = "madebyollin/taesdxl"
    vae_class = "AutoencoderTiny"
    dtype = "float16"
    latent_channels = 4
    comfyui_latents = None
    peak = {"decode": Peak(195), "encode": Peak(200)}
    instance = "nvidia-t4"  # 0.5 GB of 14
    license = "mit"
    license_link = "https://huggingface.co/madebyollin/taesdxl"
    weights_mb = 10
