from pathlib import Path

from handlers.base import EndpointHandler
from handlers.model import Peak

WEIGHTS = Path(__file__).parent.parent / "models" / "tiny"


class Tiny(EndpointHandler):
    """The VAE shipped in this repository (`scripts/train_tiny.py` made it): works with no GPU and no Hub."""

    checkpoint = str(WEIGHTS)
    vae_class = "AutoencoderKL"
    dtype = "float32"
    latent_channels = 16
    # The cheapest there is, 2 GB: the toolkit with this model peaked at 0.6 GB for a picture of 256x256 pixels.
    instance = "intel-spr"
    peak = {"decode": Peak(52, reduced=0.87), "encode": Peak(52, reduced=0.87)}
    license = "apache-2.0"
    license_link = "https://www.apache.org/licenses/LICENSE-2.0"
    weights_mb = 5
    published_config = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [8, 16, 64, 128],
        "layers_per_block": 1,
        "norm_num_groups": 1,
        "latent_channels": 16,
        "sample_size": 512,
        "scaling_factor": 0.2334,
        "shift_factor": -0.1518,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    }
