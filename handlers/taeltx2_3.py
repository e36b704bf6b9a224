from handlers.taeltx2 import Taeltx2


class Taeltx23(Taeltx2):
    """Previews of videos of LTX-2.3. It takes scaled latents alone, and the pipeline returns raw ones."""

    checkpoint = "Kijai/LTX2.3_comfy"
    subfolder = "vae"
    file = "taeltx2_3.safetensors"
    download = None
