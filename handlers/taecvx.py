from handlers.model import read_config
from handlers.taehv import Taehv


class Taecvx(Taehv):
    """Previews of videos of CogVideoX. It takes scaled latents alone."""

    file = "taecvx.safetensors"
    download = "https://github.com/madebyollin/taehv/raw/main/safetensors/taecvx.safetensors"
    pipeline_layout = "BFCHW"
    padding_frames = 1
    fps = 8
    usual_size = (480, 720, 49)
    shared_by = ""
    published_config = read_config("taecvx")
