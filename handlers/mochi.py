from handlers.base import EndpointHandler
from handlers.model import ALL, Peak


class Mochi(EndpointHandler):
    """Mochi 1. F frames become (F - 1) / 6 + 1 latent frames."""

    checkpoint = "genmo/mochi-1-preview"
    subfolder = "vae"
    vae_class = "AutoencoderKLMochi"
    dtype = "bfloat16"
    kind = "video"
    latent_channels = 12
    frame_factor = 6
    fps = 30
    peak = {"decode": Peak(4115, 1010, ALL), "encode": Peak(450, 425, ALL)}
    usual_size = (480, 848, 85)
    instance = "nvidia-l4"  # 16.5 GB of 24 in tiles; the whole frame takes 92, more than an A100 has
    license = "apache-2.0"
    license_link = "https://huggingface.co/genmo/mochi-1-preview"
    weights_mb = 1839
