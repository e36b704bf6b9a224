from pathlib import Path

from handlers.base import EndpointHandler
from handlers.model import Peak, read_config

WEIGHTS = Path(__file__).parent.parent / "models" / "tiny"


class Tiny(EndpointHandler):
    """VAE in this repository, trained by `models/tiny/train.py`. It needs no GPU and no Hub."""

    checkpoint = str(WEIGHTS)
    vae_class = "AutoencoderKL"
    dtype = "float32"
    latent_channels = 8
    vae_scale_factor = 4
    # The cheapest type, with 2 GB: the toolkit with this model peaked at 0.6 GB for an image of 256x256 pixels.
    instance = "intel-spr"
    peak = {"decode": Peak(96, reduced=0.87), "encode": Peak(67)}
    license = "apache-2.0"
    license_link = "https://www.apache.org/licenses/LICENSE-2.0"
    weights_mb = 3
    published_config = read_config("tiny")
