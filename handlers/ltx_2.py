from handlers.base import EndpointHandler
from handlers.model import ALL, Peak, read_config


class Ltx2(EndpointHandler):
    """Video VAE of LTX-2. Its own pipeline gives denormalized latents; SANA-Video's gives normalized ones."""

    checkpoint = "Lightricks/LTX-2"
    subfolder = "vae"
    vae_class = "AutoencoderKLLTX2Video"
    diffusers = "0.37"
    dtype = "bfloat16"
    kind = "video"
    latent_channels = 128
    vae_scale_factor = 32
    frame_factor = 8
    patch = 1
    raw_layouts = ("BCFHW",)  # from LTX2Pipeline
    comfyui_latents = "normalized"
    peak = {"decode": Peak(94, 44, ALL), "encode": Peak(88, 40, ALL)}
    usual_size = (512, 768, 121)
    instance = "nvidia-l4"  # 9.2 GB of 24, in bfloat16, which a T4 does not compute
    license = "ltx-2-community-license-agreement"
    license_link = "https://github.com/Lightricks/LTX-2/blob/main/LICENSE"
    weights_mb = 2445
    shared_by = "SANA-Video 720p"
    published_config = read_config("ltx-2")
