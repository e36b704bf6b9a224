from handlers.base import EndpointHandler
from handlers.model import ALL, Peak


class HunyuanVideo15(EndpointHandler):
    """HunyuanVideo 1.5: 16 pixels and 4 frames per latent."""

    checkpoint = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"
    subfolder = "vae"
    vae_class = "AutoencoderKLHunyuanVideo15"
    dtype = "bfloat16"
    kind = "video"
    latent_channels = 32
    vae_scale_factor = 16
    frame_factor = 4
    runs_batches = False  # its attention mask does not support batches
    peak = {"decode": Peak(900, 890, ALL), "encode": Peak(900, 890, ALL)}
    usual_size = (480, 848, 121)
    instance = "nvidia-l4"  # 21.6 GB of 24 in tiles; the whole frame takes 114, more than an A100 has
    license = "tencent-hunyuan-community"
    license_link = "https://huggingface.co/tencent/HunyuanVideo-1.5/blob/main/LICENSE"
    weights_mb = 5042
    shared_by = "HunyuanVideo 1.5 480p and 720p"
