from handlers.base import EndpointHandler


class HunyuanVideo(EndpointHandler):
    """HunyuanVideo: F frames become (F - 1) / 4 + 1 latent frames."""

    checkpoint = "hunyuanvideo-community/HunyuanVideo"
    subfolder = "vae"
    vae_class = "AutoencoderKLHunyuanVideo"
    kind = "video"
    dtype = "float16"
    # 320x512, 61 frames: one tensor of 256 channels at full size is 5.1 GB, and a block holds about four of them; with
    # 1 GB of weights that is over a 24 GB L4. An estimate, not measured.
    instance = "nvidia-l40s"
    license = "tencent-hunyuan-community"
    license_link = "https://huggingface.co/tencent/HunyuanVideo/blob/main/LICENSE"
    weights_mb = 986
    values_per_pixel = (1200, 425)  # measured: 1191 and 423 for 9 frames of 320x512
    frames_at_once = 17  # the peak of 17 and of 61 frames differs by 2 %
    published_config = {
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 16,
        "scaling_factor": 0.476986,
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 4,
    }
