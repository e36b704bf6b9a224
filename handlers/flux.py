from handlers.base import EndpointHandler


class Flux(EndpointHandler):
    """FLUX.1, and the models that share its VAE: Chroma, HiDream, Lumina 2, Z-Image."""

    checkpoint = "black-forest-labs/FLUX.1-schnell"
    subfolder = "vae"
    vae_class = "AutoencoderKL"
    dtype = "bfloat16"
    latent_channels = 16
    pipeline_layout = "packed"
    latents_layouts = unshifted_layouts = ("BFHWC",)  # of Kandinsky 5, which does not shift
    instance = "nvidia-l4"  # 2.2 GB of 24, in bfloat16, which a T4 does not compute
    license = "apache-2.0"
    license_link = "https://huggingface.co/black-forest-labs/FLUX.1-schnell/blob/main/LICENSE.md"
    weights_mb = 168
    shared_by = "Chroma, HiDream, Lumina 2, Z-Image, Kandinsky 5 image"
    published_config = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
