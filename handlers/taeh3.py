from handlers.model import Peak, read_config
from handlers.taehv import Taehv


class Taeh3(Taehv):
    """Previews of videos of MiniMax-H3. It takes scaled latents alone."""

    file = "taeh3.safetensors"
    download = "https://github.com/madebyollin/taehv/raw/main/safetensors/taeh3.safetensors"
    latent_channels = 24
    vae_scale_factor = 16
    clip = 5
    comfyui_latents = "normalized"
    peak = {"decode": Peak(135), "encode": Peak(185)}  # one frame is padded to a clip
    usual_size = (768, 1344, 124)
    shared_by = ""
    published_config = read_config("taeh3")
