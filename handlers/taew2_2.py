from handlers.model import Peak, read_config
from handlers.taew2_1 import Taew21


class Taew22(Taew21):
    """Previews of videos of Wan 2.2 TI2V-5B. It takes scaled latents alone."""

    file = "taew2_2.safetensors"
    latent_channels = 48
    vae_scale_factor = 16
    fps = 24
    peak = {"decode": Peak(135), "encode": Peak(88, 6, 5)}
    usual_size = (704, 1280, 121)
    shared_by = "Wan 2.2 TI2V-5B, Bria FIBO"
    published_config = read_config("taew2.2")
