from handlers.base import EndpointHandler
from handlers.model import Peak


class GlmImage(EndpointHandler):
    """GLM-Image: its pipeline uses the mean and the deviation of the latents, and not the factor beside them."""

    checkpoint = "zai-org/GLM-Image"
    subfolder = "vae"
    vae_class = "AutoencoderKL"
    dtype = "bfloat16"
    latent_channels = 16
    uses_scaling_factor = False
    peak = {"decode": Peak(1540, reduced=0.69), "encode": Peak(645, reduced=0.66)}
    instance = "nvidia-l4"  # 4.9 GB of 24, in bfloat16, which a T4 does not compute
    license = "mit"
    license_link = "https://huggingface.co/zai-org/GLM-Image"
    weights_mb = 812
    published_config = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 512, 1024, 1024],
        "layers_per_block": 3,
        "latent_channels": 16,
        "sample_size": 1024,
        "latents_mean": [
            -0.2080078125,
            1.875,
            -0.470703125,
            -1.265625,
            -1.421875,
            0.77734375,
            -0.3671875,
            -0.9453125,
            0.318359375,
            0.7734375,
            -0.1884765625,
            -0.022216796875,
            -0.220703125,
            -1.59375,
            -0.81640625,
            -0.255859375,
        ],
        "latents_std": [
            3.0625,
            2.203125,
            2.265625,
            4.84375,
            2.5,
            3.9375,
            2.203125,
            3.03125,
            2.1875,
            2.046875,
            2.71875,
            2.390625,
            2.390625,
            2.453125,
            2.25,
            2.15625,
        ],
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    }
