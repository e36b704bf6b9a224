from pathlib import Path

from handlers.base import EndpointHandler

WEIGHTS = Path(__file__).parent.parent / "models" / "tiny"


class Tiny(EndpointHandler):
    """The VAE shipped in this repository (`scripts/train_tiny.py` made it): works with no GPU and no Hub."""

    checkpoint = str(WEIGHTS)
    vae_class = "AutoencoderKL"
    dtype = "float32"
