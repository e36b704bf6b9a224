from handlers.model import Peak, read_config
from handlers.wan_2_1 import Wan21


class Wan21Twice(Wan21):
    """Wan 2.1's encoder and latents with a decoder of twice the height and width, trained on photographs alone.

    A pixel shuffle follows its decoder, which has 12 channels. The memory of a pass is almost that of Wan 2.1.
    """

    checkpoint = "spacepxl/Wan2.1-VAE-upscale2x"
    subfolder = "diffusers/Wan2.1_VAE_upscale2x_imageonly_real_v1"
    upscale = 2
    peak = {"decode": Peak(440, 280, 4, reduced=0.96, tile=4), "encode": Peak(965, 670, 5, reduced=0.98)}
    usual_size = (960, 1664, 81)
    license_link = "https://huggingface.co/spacepxl/Wan2.1-VAE-upscale2x"
    shared_by = "Wan 2.1, Wan 2.2 A14B, Qwen-Image, Krea 2"
    published_config = read_config("wan-2.1-2x")
