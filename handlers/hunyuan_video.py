from handlers.base import EndpointHandler
from handlers.model import Peak


class HunyuanVideo(EndpointHandler):
    """HunyuanVideo: F frames become (F - 1) / 4 + 1 latent frames."""

    checkpoint = "hunyuanvideo-community/HunyuanVideo"
    subfolder = "vae"
    vae_class = "AutoencoderKLHunyuanVideo"
    dtype = "float16"
    kind = "video"
    latent_channels = 16
    frame_factor = 4
    latents_layouts = ("BFHWC",)  # of Kandinsky 5
    # 320x512, 61 frames: one tensor of 256 channels at full size is 5.1 GB, and a block holds about four of them; with
    # 1 GB of weights that is over a 24 GB L4. An estimate, not measured.
    instance = "nvidia-l40s"
    peak = {"decode": Peak(1480, 1140, 17, reduced=0.45), "encode": Peak(900, 642, 17, reduced=0.5)}
    license = "tencent-hunyuan-community"
    license_link = "https://huggingface.co/tencent/HunyuanVideo/blob/main/LICENSE"
    weights_mb = 986
    published_config = {
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 16,
        "scaling_factor": 0.476986,
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 4,
    }
