from handlers.base import EndpointHandler


class PlaygroundV25(EndpointHandler):
    """Playground v2.5: the architecture of SDXL, with a mean and a deviation for each channel of its latents."""

    checkpoint = "playgroundai/playground-v2.5-1024px-aesthetic"
    subfolder = "vae"
    vae_class = "AutoencoderKL"
    dtype = "float32"
    latent_channels = 4
    instance = "nvidia-t4"  # 4.4 GB of 14
    license = "playground-v2dot5-community"
    license_link = "https://huggingface.co/playgroundai/playground-v2.5-1024px-aesthetic/blob/main/LICENSE.md"
    weights_mb = 335
    published_config = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 1024,
        "scaling_factor": 0.5,
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    }
