from handlers.model import read_config
from handlers.taew2_1 import Taew21


class LightTaew21(Taew21):
    """LightX2V's tiny VAE of Wan 2.1: taew2.1's network, with weights for raw latents."""

    file = "lighttaew2_1.safetensors"
    takes_scaled = False
    comfyui_latents = "raw"
    license = "apache-2.0"
    license_link = "https://huggingface.co/lightx2v/Autoencoders"
    weights_mb = 45
    published_config = read_config("lighttaew2.1")
