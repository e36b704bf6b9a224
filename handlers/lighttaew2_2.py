from handlers.model import read_config
from handlers.taew2_2 import Taew22


class LightTaew22(Taew22):
    """LightX2V's tiny VAE of Wan 2.2 TI2V-5B: taew2.2's network, with weights for raw latents."""

    file = "lighttaew2_2.safetensors"
    takes_scaled = False
    comfyui_latents = "raw"
    license = "apache-2.0"
    license_link = "https://huggingface.co/lightx2v/Autoencoders"
    weights_mb = 45
    published_config = read_config("lighttaew2.2")
