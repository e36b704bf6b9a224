from handlers.base import EndpointHandler
from handlers.model import Peak


class CogVideoX(EndpointHandler):
    """CogVideoX-2b, and 5b and 1.5 with their weights. Version 1.5 puts a frame of padding before some videos."""

    checkpoint = "THUDM/CogVideoX-2b"
    subfolder = "vae"
    vae_class = "AutoencoderKLCogVideoX"
    dtype = "float16"
    kind = "video"
    latent_channels = 16
    frame_factor = 4
    pipeline_layout = "BFCHW"
    padding_frames = 1
    fps = 8
    takes_reciprocal = True
    peak = {"decode": Peak(5175, 2590, 8), "encode": Peak(2665, 860, 12)}
    usual_size = (480, 720, 49)
    instance = "nvidia-l4"  # 21.1 GB of 24
    license = "apache-2.0"
    license_link = "https://huggingface.co/THUDM/CogVideoX-2b/blob/main/LICENSE"
    weights_mb = 431
    shared_by = "CogVideoX-5b and 1.5 (with their weights), ConsisID"
