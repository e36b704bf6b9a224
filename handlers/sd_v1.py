from handlers.base import EndpointHandler


class StableDiffusionV1(EndpointHandler):
    """Stable Diffusion 1.x and 2.x: the `ft-mse` fine-tune, as the pilot's endpoint had it."""

    checkpoint = "stabilityai/sd-vae-ft-mse"
    vae_class = "AutoencoderKL"
    dtype = "float16"
    latent_channels = 4
    usual_size = (512, 512)
    instance = "nvidia-t4"  # 0.7 GB of 14
    license = "mit"
    license_link = "https://huggingface.co/stabilityai/sd-vae-ft-mse"
    weights_mb = 335
    published_config = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 256,
        "scaling_factor": 0.18215,
    }
