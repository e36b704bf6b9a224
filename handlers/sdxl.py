from handlers.base import EndpointHandler


class StableDiffusionXL(EndpointHandler):
    """Stable Diffusion XL: the fine-tune whose activations fit float16 (the original overflows to black pictures)."""

    checkpoint = "madebyollin/sdxl-vae-fp16-fix"
    vae_class = "AutoencoderKL"
    dtype = "float16"
    latent_channels = 4
    instance = "nvidia-t4"  # 2.2 GB of 14
    license = "mit"
    license_link = "https://huggingface.co/madebyollin/sdxl-vae-fp16-fix"
    weights_mb = 335
    shared_by = "PixArt-Sigma, AuraFlow, Hunyuan-DiT"
    published_config = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
        "scaling_factor": 0.13025,
        "force_upcast": False,
    }
