from handlers.model import Peak, read_config
from handlers.taehv import Taehv


class Taehv15(Taehv):
    """Previews of videos of HunyuanVideo 1.5. It takes scaled latents alone."""

    file = "taehv1_5.safetensors"
    download = "https://github.com/madebyollin/taehv/raw/main/safetensors/taehv1_5.safetensors"
    latent_channels = 32
    vae_scale_factor = 16
    peak = {"decode": Peak(135), "encode": Peak(88, 6, 5)}
    usual_size = (480, 832, 121)
    shared_by = ""
    published_config = read_config("taehv1.5")
