from handlers.base import EndpointHandler
from handlers.model import ALL, Peak, read_config


class LtxVideo(EndpointHandler):
    """LTX-Video from 0.9.5 on, and 0.9.0 and 0.9.1 with their weights. From 0.9.1 on it takes `decode_timestep`."""

    checkpoint = "Lightricks/LTX-Video-0.9.5"
    subfolder = "vae"
    vae_class = "AutoencoderKLLTXVideo"
    dtype = "bfloat16"
    kind = "video"
    latent_channels = 128
    pipeline_layout = "packed"
    vae_scale_factor = 32
    frame_factor = 8
    patch = 1
    comfyui_latents = "normalized"
    peak = {"decode": Peak(76, 36, ALL), "encode": Peak(88, 48, ALL)}
    usual_size = (480, 704, 161)
    instance = "nvidia-l4"  # 9.1 GB of 24, in bfloat16, which a T4 does not compute
    license = "ltx-video-openrail-m"
    license_link = "https://huggingface.co/Lightricks/LTX-Video/blob/main/ltx-video-2b-v0.9.5.license.txt"
    weights_mb = 2494
    shared_by = "LTX-Video 0.9.5 to 0.9.8"
    published_config = read_config("ltx-video")
