"""The VAEs that this project serves: one small `EndpointHandler` subclass each.

Importing this package imports no torch, so the deploy script and `make models` read it on any machine.
"""

from handlers.base import EndpointHandler
from handlers.flux import Flux
from handlers.hunyuan_video import HunyuanVideo
from handlers.sd_v1 import StableDiffusionV1
from handlers.sdxl import StableDiffusionXL
from handlers.tiny import Tiny

__version__ = "0.1.0"

MODELS: dict[str, type[EndpointHandler]] = {
    "sd-v1": StableDiffusionV1,
    "sdxl": StableDiffusionXL,
    "flux": Flux,
    "hunyuan-video": HunyuanVideo,
    "tiny": Tiny,
}


def get_model(key: str | None) -> type[EndpointHandler]:
    """The handler class of a model key. Raises `ValueError` that lists the keys for any other value."""
    if key not in MODELS:
        asked = f"there is no model {key!r}" if key else "no model was named (VAE_MODEL, or endpoint.json)"
        raise ValueError(f"{asked}; the models are: {', '.join(MODELS)}")
    return MODELS[key]
