from handlers.ltx_2 import Ltx2
from handlers.model import ALL, Peak, read_config


class Ltx23(Ltx2):
    """Video VAE of LTX-2.3, and LTX-2.5's with its weights. Its latents are others than those of LTX-2."""

    checkpoint = "diffusers/LTX-2.3-Diffusers"
    vae_class = "AutoencoderKLLTX2Video"
    diffusers = "0.38"  # upsample_type
    peak = {"decode": Peak(94, 44, ALL), "encode": Peak(88, 40, ALL)}
    license_link = "https://huggingface.co/Lightricks/LTX-2.3/blob/main/LICENSE"
    weights_mb = 1452
    shared_by = "LTX-2.5, SANA-Video 2"
    published_config = read_config("ltx-2.3")
