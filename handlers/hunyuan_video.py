from handlers.base import EndpointHandler


class HunyuanVideo(EndpointHandler):
    """HunyuanVideo: F frames become (F - 1) / 4 + 1 latent frames."""

    checkpoint = "hunyuanvideo-community/HunyuanVideo"
    subfolder = "vae"
    vae_class = "AutoencoderKLHunyuanVideo"
    kind = "video"
    dtype = "float16"
    published_config = {
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 16,
        "scaling_factor": 0.476986,
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 4,
    }
