from handlers.base import EndpointHandler
from handlers.model import read_config


class StableDiffusionV1(EndpointHandler):
    """Stable Diffusion 1.x and 2.x: the `ft-mse` fine-tune, like in Hugging Face's remote VAE pilot of 2025."""

    checkpoint = "stabilityai/sd-vae-ft-mse"
    vae_class = "AutoencoderKL"
    dtype = "float16"
    latent_channels = 4
    usual_size = (512, 512)
    instance = "nvidia-t4"  # 0.7 GB of 14
    license = "mit"
    license_link = "https://huggingface.co/stabilityai/sd-vae-ft-mse"
    weights_mb = 335
    published_config = read_config("sd-v1")
