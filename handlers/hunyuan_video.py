from handlers.base import EndpointHandler
from handlers.model import Peak, read_config


class HunyuanVideo(EndpointHandler):
    """HunyuanVideo. F frames become (F - 1) / 4 + 1 latent frames."""

    checkpoint = "hunyuanvideo-community/HunyuanVideo"
    subfolder = "vae"
    vae_class = "AutoencoderKLHunyuanVideo"
    dtype = "float16"
    kind = "video"
    latent_channels = 16
    frame_factor = 4
    latents_layouts = ("BFHWC",)  # from Kandinsky 5
    peak = {"decode": Peak(1480, 1140, 17, 0.45, 0.78), "encode": Peak(900, 795, 17, 0.42, 0.86)}
    usual_size = (720, 1280, 129)
    instance = "nvidia-l40s"  # 25.6 GB of 48 in reduced memory; diffusers' own pass takes 49.5
    license = "tencent-hunyuan-community"
    license_link = "https://huggingface.co/tencent/HunyuanVideo/blob/main/LICENSE"
    weights_mb = 986
    shared_by = "FramePack, SkyReels-V1, Kandinsky 5 video"
    published_config = read_config("hunyuan-video")
