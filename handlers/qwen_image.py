from handlers.base import EndpointHandler
from handlers.model import Peak


class QwenImage(EndpointHandler):
    """Qwen-Image: the VAE of a video model, for pictures."""

    checkpoint = "Qwen/Qwen-Image"
    subfolder = "vae"
    vae_class = "AutoencoderKLQwenImage"
    dtype = "bfloat16"
    latent_channels = 16
    pipeline_layout = "packed"
    peak = {"decode": Peak(1735, reduced=0.82), "encode": Peak(965, reduced=0.8)}
    license = "apache-2.0"
    license_link = "https://huggingface.co/Qwen/Qwen-Image"
    weights_mb = 254
    shared_by = "Qwen-Image-Edit, Edit-2509 and Edit-2511, Krea 2, NucleusMoE"
    published_config = {}  # the class's own defaults
