from typing import Any, ClassVar, Literal

from handlers.base import EndpointHandler
from handlers.model import Kind, Peak


class Taehv(EndpointHandler):
    """Previews of HunyuanVideo's videos, and the base of the TAEHV family: 23 MB, for a cheap machine.

    It takes the scaled latents of the diffusion model, and no raw ones.
    """

    subfolder: ClassVar[str | None] = None
    checkpoint = "madebyollin/taehv"
    file: ClassVar[str | None] = "taehv.safetensors"
    download: ClassVar[str | None] = "https://github.com/madebyollin/taehv/raw/main/safetensors/taehv.safetensors"
    vae_class = "handlers.serving.vae.taehv:TinyVideoAutoencoder"
    dtype = "float16"
    kind: ClassVar[Kind] = "video"
    latent_channels = 16
    frame_factor = 4
    takes_scaled: ClassVar[bool] = True
    comfyui_latents: ClassVar[Literal["raw", "normalized"] | None] = None
    tiles = ()
    peak = {"decode": Peak(530), "encode": Peak(330, 21, 5)}
    usual_size: ClassVar[tuple[int, ...]] = (720, 1280, 129)
    instance = "nvidia-t4"
    license = "mit"
    license_link: ClassVar[str | None] = "https://github.com/madebyollin/taehv/blob/main/LICENSE"
    weights_mb: ClassVar[int | None] = 23
    shared_by = "HunyuanVideo, FramePack, SkyReels-V1, Kandinsky 5 video"
    published_config: ClassVar[dict[str, Any]] = {}
