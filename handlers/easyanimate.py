from handlers.base import EndpointHandler
from handlers.model import Peak


class EasyAnimate(EndpointHandler):
    """EasyAnimate 5 and 5.1."""

    checkpoint = "alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers"
    subfolder = "vae"
    vae_class = "AutoencoderKLMagvit"
    dtype = "float16"
    kind = "video"
    latent_channels = 16
    frame_factor = 4
    fps = 8
    takes_reciprocal = True
    peak = {"decode": Peak(5345, 4480, 2), "encode": Peak(2345, 1080, 4)}
    usual_size = (512, 512, 49)
    instance = "nvidia-t4"  # 7.3 GB of 14
    license = "apache-2.0"
    license_link = "https://huggingface.co/alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers"
    weights_mb = 489
