from handlers.base import EndpointHandler
from handlers.model import read_config


class PlaygroundV25(EndpointHandler):
    """Playground v2.5: SDXL's architecture, with a mean and a deviation for each channel of latents."""

    checkpoint = "playgroundai/playground-v2.5-1024px-aesthetic"
    subfolder = "vae"
    vae_class = "AutoencoderKL"
    dtype = "float32"
    latent_channels = 4
    instance = "nvidia-t4"  # 4.4 GB of 14
    license = "playground-v2dot5-community"
    license_link = "https://huggingface.co/playgroundai/playground-v2.5-1024px-aesthetic/blob/main/LICENSE.md"
    weights_mb = 335
    published_config = read_config("playground-v2.5")
