from typing import ClassVar, Literal

from handlers.model import read_config
from handlers.qwen_image import QwenImage


class QwenImageLayered(QwenImage):
    """Qwen-Image-Layered: an image as layers with transparency. Qwen-Image's VAE with four channels of pixels."""

    checkpoint = "Qwen/Qwen-Image-Layered"
    pixel_channels: ClassVar[Literal[3, 4]] = 4
    has_layers = True
    usual_size = (640, 640)
    license_link = "https://huggingface.co/Qwen/Qwen-Image-Layered"
    shared_by = ""
    published_config = read_config("qwen-image-layered")
