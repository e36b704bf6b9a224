from handlers.base import EndpointHandler
from handlers.model import Peak


class Wan21(EndpointHandler):
    """Wan 2.1 and the models that share its VAE. diffusers' documentation runs it in float32."""

    checkpoint = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    subfolder = "vae"
    vae_class = "AutoencoderKLWan"
    dtype = "float16"
    kind = "video"
    latent_channels = 16
    frame_factor = 4
    fps = 16
    peak = {"decode": Peak(1735, 1095, 4, reduced=0.96), "encode": Peak(965, 670, 5, reduced=0.98)}
    usual_size = (480, 832, 81)
    instance = "nvidia-t4"  # 6.2 GB of 14
    license = "apache-2.0"
    license_link = "https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    weights_mb = 508
    shared_by = (
        "Wan 2.1 T2V, I2V, FLF2V, VACE, Wan 2.2 A14B and Animate, SkyReels-V2, Cosmos-Predict 2 and 2.5, SANA-Video"
    )
