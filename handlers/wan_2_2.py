from handlers.base import EndpointHandler
from handlers.model import Peak, read_config


class Wan22(EndpointHandler):
    """Wan 2.2 TI2V-5B: 16 pixels and 4 frames per latent."""

    checkpoint = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    subfolder = "vae"
    vae_class = "AutoencoderKLWan"
    dtype = "float16"
    kind = "video"
    latent_channels = 48
    vae_scale_factor = 16
    frame_factor = 4
    peak = {"decode": Peak(1455, 975, 5, reduced=0.96), "encode": Peak(490, 1340, 2, reduced=1.12, tile=4)}
    usual_size = (704, 1280, 121)
    instance = "nvidia-l4"  # 16.7 GB of 24
    license = "apache-2.0"
    license_link = "https://huggingface.co/Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    weights_mb = 2819
    shared_by = "Bria FIBO, Cosmos 3, Lucy Edit"
    published_config = read_config("wan-2.2")
