from handlers.base import EndpointHandler
from handlers.model import Peak


class CogView4(EndpointHandler):
    """CogView4."""

    checkpoint = "zai-org/CogView4-6B"
    subfolder = "vae"
    vae_class = "AutoencoderKL"
    dtype = "bfloat16"
    latent_channels = 16
    peak = {"decode": Peak(1540, reduced=0.69), "encode": Peak(645, reduced=0.66)}
    instance = "nvidia-l4"  # 4.9 GB of 24, in bfloat16, which a T4 does not compute
    license = "apache-2.0"
    license_link = "https://huggingface.co/zai-org/CogView4-6B"
    weights_mb = 812
    published_config = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 512, 1024, 1024],
        "layers_per_block": 3,
        "latent_channels": 16,
        "sample_size": 1024,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    }
