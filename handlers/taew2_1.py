from handlers.taehv import Taehv


class Taew21(Taehv):
    """Previews of videos of Wan 2.1 and Wan 2.2 A14B, and of Qwen-Image. It takes scaled latents alone."""

    checkpoint = "lightx2v/Autoencoders"
    file = "taew2_1.safetensors"
    download = None
    fps = 16
    usual_size = (480, 832, 81)
    shared_by = "Wan 2.1, Wan 2.2 A14B, SkyReels-V2, Qwen-Image"
