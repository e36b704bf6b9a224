"""VAEs of this project, each a small subclass of `EndpointHandler`.

Importing this package imports no torch, so the deploy script and `make models` can read it on any machine.
"""

from handlers.base import EndpointHandler
from handlers.cogvideox import CogVideoX
from handlers.cogview4 import CogView4
from handlers.easyanimate import EasyAnimate
from handlers.flux import Flux
from handlers.flux2 import Flux2
from handlers.flux2_small import Flux2Small
from handlers.glm_image import GlmImage
from handlers.hunyuan_image import HunyuanImage
from handlers.hunyuan_video import HunyuanVideo
from handlers.hunyuan_video_1_5 import HunyuanVideo15
from handlers.lighttaew2_1 import LightTaew21
from handlers.lighttaew2_2 import LightTaew22
from handlers.ltx_2 import Ltx2
from handlers.ltx_2_3 import Ltx23
from handlers.ltx_video import LtxVideo
from handlers.minimax_h3 import MiniMaxH3
from handlers.mochi import Mochi
from handlers.model import WrongWeights, did_you_mean, split_keys
from handlers.playground_v2_5 import PlaygroundV25
from handlers.qwen_image import QwenImage
from handlers.qwen_image_2_1 import QwenImage21
from handlers.qwen_image_layered import QwenImageLayered
from handlers.sana import Sana
from handlers.sd3 import StableDiffusion3
from handlers.sd_v1 import StableDiffusionV1
from handlers.sdxl import StableDiffusionXL
from handlers.svd import StableVideoDiffusion
from handlers.taecvx import Taecvx
from handlers.taef1 import Taef1
from handlers.taef2 import Taef2
from handlers.taeh3 import Taeh3
from handlers.taehv import Taehv
from handlers.taehv1_5 import Taehv15
from handlers.taeltx2 import Taeltx2
from handlers.taeltx2_3 import Taeltx23
from handlers.taesd import Taesd
from handlers.taesd3 import Taesd3
from handlers.taesdxl import TaesdXL
from handlers.taew2_1 import Taew21
from handlers.taew2_2 import Taew22
from handlers.tiny import Tiny
from handlers.version import VERSION
from handlers.wan_2_1 import Wan21
from handlers.wan_2_1_2x import Wan21Twice
from handlers.wan_2_2 import Wan22

__version__ = VERSION

MODELS: dict[str, type[EndpointHandler]] = {
    "sd-v1": StableDiffusionV1,
    "sdxl": StableDiffusionXL,
    "sd3": StableDiffusion3,
    "flux": Flux,
    "flux2": Flux2,
    "flux2-small": Flux2Small,
    "qwen-image": QwenImage,
    "qwen-image-2.1": QwenImage21,
    "qwen-image-layered": QwenImageLayered,
    "hunyuan-image": HunyuanImage,
    "sana": Sana,
    "glm-image": GlmImage,
    "cogview4": CogView4,
    "playground-v2.5": PlaygroundV25,
    "wan-2.1": Wan21,
    "wan-2.1-2x": Wan21Twice,
    "wan-2.2": Wan22,
    "hunyuan-video": HunyuanVideo,
    "hunyuan-video-1.5": HunyuanVideo15,
    "ltx-video": LtxVideo,
    "ltx-2": Ltx2,
    "ltx-2.3": Ltx23,
    "cogvideox": CogVideoX,
    "mochi": Mochi,
    "minimax-h3": MiniMaxH3,
    "svd": StableVideoDiffusion,
    "easyanimate": EasyAnimate,
    "taesd": Taesd,
    "taesdxl": TaesdXL,
    "taesd3": Taesd3,
    "taef1": Taef1,
    "taef2": Taef2,
    "taew2.1": Taew21,
    "taew2.2": Taew22,
    "taehv": Taehv,
    "taehv1.5": Taehv15,
    "taecvx": Taecvx,
    "taeltx2": Taeltx2,
    "taeltx2.3": Taeltx23,
    "taeh3": Taeh3,
    "lighttaew2.1": LightTaew21,
    "lighttaew2.2": LightTaew22,
    "tiny": Tiny,
}


def get_models(keys: str | None) -> dict[str, type[EndpointHandler]]:
    """Return the handler classes of keys that are separated by commas.

    Raises:
        ValueError: a model does not exist, or is named twice.
    """
    names = split_keys(keys)
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is named twice")
    return {name: get_model(name) for name in names}


def get_handler(keys: str | None) -> type[EndpointHandler]:
    """Return the class that serves the models of these keys: a model's own, or a new one for several models."""
    models = get_models(keys)
    if len(models) == 1:
        return next(iter(models.values()))
    return type("SeveralModels", (EndpointHandler,), {"models": models})


def get_model(key: str | None) -> type[EndpointHandler]:
    """Return the handler class of a key. Raise `ValueError` for an unknown key, or a class that lacks an attribute."""
    if key not in MODELS:
        problem = f"there is no model {key!r}{did_you_mean(key, MODELS)}" if key else "no model was named"
        raise ValueError(f"{problem}; the models are: {', '.join(MODELS)}")
    if missing := [name for name in ("checkpoint", "vae_class", "dtype") if not hasattr(MODELS[key], name)]:
        raise ValueError(f"{key} does not declare {', '.join(missing)}; handlers/model.py says what that is")
    return MODELS[key]


def fitting_models(error: Exception) -> str:
    """Return the models that weights of another network fit, for an error text; "" for another error."""
    if not isinstance(error, WrongWeights):
        return ""
    wanted = error.vae_class, error.latent_channels
    others = {key: model for key, model in MODELS.items() if model is not error.refused_by}
    fitting = [key for key, model in others.items() if (model.vae_class, model.latent_channels) == wanted]
    return f"; they fit MODEL={' or '.join(fitting)}" if fitting else ""
