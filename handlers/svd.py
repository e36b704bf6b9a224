from handlers.base import EndpointHandler
from handlers.model import ALL, Peak, read_config


class StableVideoDiffusion(EndpointHandler):
    """Stable Video Diffusion. Frames are encoded one by one, and decoded together as a batch."""

    checkpoint = "stabilityai/stable-video-diffusion-img2vid-xt"
    subfolder = "vae"
    vae_class = "AutoencoderKLTemporalDecoder"
    dtype = "float16"
    kind = "video"
    latent_channels = 4
    pipeline_layout = "BFCHW"
    fps = 7
    tiles = ()  # diffusers has no tiles for it
    takes_reciprocal = True
    peak = {"decode": Peak(1025, 1025, ALL), "encode": Peak(640, 640, ALL)}
    usual_size = (576, 1024, 25)
    instance = "nvidia-l40s"  # 38.4 GB of 48, all frames at once; chunks of frames take less, but the plan ignores them
    license = "stable-video-diffusion-community"
    license_link = "https://huggingface.co/stabilityai/stable-video-diffusion-img2vid-xt/blob/main/LICENSE.md"
    weights_mb = 391
    shared_by = "Stable Video Diffusion 14 and 25 frames"
    published_config = read_config("svd")
