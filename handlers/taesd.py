from handlers.base import EndpointHandler
from handlers.model import Peak


class Taesd(EndpointHandler):
    """Previews of Stable Diffusion 1.x and 2.x in milliseconds.

    It takes the scaled latents of the diffusion model: send no factor, or `do_scaling`.
    """

    checkpoint = "madebyollin/taesd"
    vae_class = "AutoencoderTiny"
    dtype = "float16"
    latent_channels = 4
    comfyui_latents = None
    peak = {"decode": Peak(195), "encode": Peak(200)}
    instance = "nvidia-t4"  # 0.5 GB of 14
    license = "mit"
    license_link = "https://huggingface.co/madebyollin/taesd"
    weights_mb = 10
