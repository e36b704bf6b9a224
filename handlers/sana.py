from handlers.base import EndpointHandler
from handlers.model import Peak, read_config


class Sana(EndpointHandler):
    """Sana: the deep-compression autoencoder with 32 pixels per latent (DC-AE f32c32)."""

    checkpoint = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
    vae_class = "AutoencoderDC"
    dtype = "bfloat16"
    latent_channels = 32
    vae_scale_factor = 32
    peak = {"decode": Peak(720), "encode": Peak(780)}  # in half precision its norms compute in float32
    instance = "nvidia-l4"  # 2.5 GB of 24, in bfloat16, which a T4 does not compute
    license = "apache-2.0"
    license_link = "https://github.com/mit-han-lab/efficientvit/issues/166"
    weights_mb = 1249
    shared_by = "Sana 1.5, Sana-Sprint, PRX"
    published_config = read_config("sana")
