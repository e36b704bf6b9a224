from handlers.base import EndpointHandler
from handlers.model import Peak, read_config


class CogView4(EndpointHandler):
    """CogView4."""

    checkpoint = "zai-org/CogView4-6B"
    subfolder = "vae"
    vae_class = "AutoencoderKL"
    dtype = "bfloat16"
    latent_channels = 16
    peak = {"decode": Peak(1540, reduced=0.69), "encode": Peak(645, reduced=0.66)}
    instance = "nvidia-l4"  # 4.9 GB of 24, in bfloat16, which a T4 does not compute
    license = "apache-2.0"
    license_link = "https://huggingface.co/zai-org/CogView4-6B"
    weights_mb = 812
    published_config = read_config("cogview4")
