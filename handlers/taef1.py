from handlers.base import EndpointHandler
from handlers.model import Peak, read_config


class Taef1(EndpointHandler):
    """Previews of FLUX.1, and of models that share its latents, in milliseconds.

    It takes the scaled latents of the diffusion model: send no factor, or `do_scaling`.
    """

    checkpoint = "madebyollin/taef1"
    vae_class = "AutoencoderTiny"
    dtype = "float16"
    latent_channels = 16
    tiles = ("decode",)  # tiled encoding of 16 channels fails in diffusers up to 0.42
    comfyui_latents = None
    peak = {"decode": Peak(195), "encode": Peak(200)}
    instance = "nvidia-t4"  # 0.5 GB of 14
    license = "mit"
    license_link = "https://huggingface.co/madebyollin/taef1"
    weights_mb = 10
    published_config = read_config("taef1")
