from handlers.base import EndpointHandler
from handlers.model import Peak, read_config


class GlmImage(EndpointHandler):
    """GLM-Image. Its pipeline applies the mean and the deviation of the config, but not the factor."""

    checkpoint = "zai-org/GLM-Image"
    subfolder = "vae"
    vae_class = "AutoencoderKL"
    dtype = "bfloat16"
    latent_channels = 16
    uses_scaling_factor = False
    peak = {"decode": Peak(1540, reduced=0.69), "encode": Peak(645, reduced=0.66)}
    instance = "nvidia-l4"  # 4.9 GB of 24, in bfloat16, which a T4 does not compute
    license = "mit"
    license_link = "https://huggingface.co/zai-org/GLM-Image"
    weights_mb = 812
    published_config = read_config("glm-image")
