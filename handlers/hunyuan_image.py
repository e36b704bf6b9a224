from handlers.base import EndpointHandler
from handlers.model import Peak, read_config


class HunyuanImage(EndpointHandler):
    """HunyuanImage 2.1: 32 pixels per latent."""

    checkpoint = "hunyuanvideo-community/HunyuanImage-2.1-Diffusers"
    subfolder = "vae"
    vae_class = "AutoencoderKLHunyuanImage"
    dtype = "bfloat16"
    latent_channels = 64
    vae_scale_factor = 32
    tiles = ("decode",)  # tiled encoding fails in diffusers up to 0.42
    peak = {"decode": Peak(450), "encode": Peak(385)}
    usual_size = (2048, 2048)
    instance = "nvidia-l4"  # 5.7 GB of 24, in bfloat16, which a T4 does not compute
    license = "tencent-hunyuan-community"
    license_link = "https://github.com/Tencent-Hunyuan/HunyuanImage-2.1/blob/master/LICENSE"
    weights_mb = 811
    published_config = read_config("hunyuan-image")
