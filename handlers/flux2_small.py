from handlers.flux2 import Flux2
from handlers.model import Peak, read_config


class Flux2Small(Flux2):
    """FLUX.2's encoder and latents with a smaller decoder, which Black Forest Labs distilled from FLUX.2's own."""

    checkpoint = "black-forest-labs/FLUX.2-small-decoder"
    subfolder = None
    vae_class = "AutoencoderKLFlux2"
    diffusers = "0.38"  # decoder_block_out_channels
    peak = {"decode": Peak(580, reduced=0.75), "encode": Peak(645, reduced=0.66)}
    license_link = "https://huggingface.co/black-forest-labs/FLUX.2-small-decoder"
    weights_mb = 250
    shared_by = "FLUX.2 dev and klein, ERNIE-Image, Bria FIBO 2"
    published_config = read_config("flux2-small")
