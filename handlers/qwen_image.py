from handlers.base import EndpointHandler
from handlers.model import Peak


class QwenImage(EndpointHandler):
    """Qwen-Image: the VAE of a video model, for images."""

    checkpoint = "Qwen/Qwen-Image"
    subfolder = "vae"
    vae_class = "AutoencoderKLQwenImage"
    dtype = "bfloat16"
    latent_channels = 16
    pipeline_layout = "packed"
    peak = {"decode": Peak(1735, reduced=0.88), "encode": Peak(965, reduced=0.92)}
    usual_size = (1328, 1328)
    instance = "nvidia-l4"  # 8.0 GB of 24, in bfloat16, which a T4 does not compute
    license = "apache-2.0"
    license_link = "https://huggingface.co/Qwen/Qwen-Image"
    weights_mb = 254
    shared_by = "Qwen-Image-Edit, Edit-2509 and Edit-2511, Krea 2, NucleusMoE"
