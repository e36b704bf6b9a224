from pathlib import Path

from handlers.base import EndpointHandler

WEIGHTS = Path(__file__).parent.parent / "models" / "tiny"


class Tiny(EndpointHandler):
    """The VAE shipped in this repository (`scripts/train_tiny.py` made it): works with no GPU and no Hub."""

    checkpoint = str(WEIGHTS)
    vae_class = "AutoencoderKL"
    dtype = "float32"
    # The cheapest CPU.
    instance = "intel-spr"
    license = "apache-2.0"
    license_link = "https://www.apache.org/licenses/LICENSE-2.0"
    weights_mb = 1
