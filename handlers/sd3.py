from handlers.base import EndpointHandler


class StableDiffusion3(EndpointHandler):
    """Stable Diffusion 3 and 3.5."""

    checkpoint = "stabilityai/stable-diffusion-3.5-medium"
    subfolder = "vae"
    vae_class = "AutoencoderKL"
    dtype = "float16"
    latent_channels = 16
    instance = "nvidia-t4"  # 2.2 GB of 14
    license = "stabilityai-ai-community"
    license_link = "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md"
    weights_mb = 168
    shared_by = "Stable Diffusion 3 medium, 3.5 medium and large"
    published_config = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "force_upcast": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
