from handlers.base import EndpointHandler
from handlers.model import Peak

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class MiniMaxH3(EndpointHandler):
    """Video VAE of MiniMax-H3: a causal encoder and a transformer as decoder, 2.6 billion parameters.

    Both take clips of 17 frames in tiles of 256x256, and pixels that are normalized as for ImageNet.
    """

    checkpoint = "MiniMaxAI/MiniMax-H3"
    subfolder = "vae"
    vae_class = "AutoencoderKLMiniMaxH3"
    diffusers = "0.40"
    dtype = "float32"  # the checkpoint's; diffusers keeps its encoder and norms in float32 in any case
    kind = "video"
    latent_channels = 24
    vae_scale_factor = 16
    frame_factor = 4
    clip = 5
    least_latent_frames = 3
    pixel_statistics = IMAGENET
    always_tiles = True
    comfyui_latents = "normalized"
    peak = {"decode": Peak(700), "encode": Peak(800, 2125, 5)}  # 5 frames are padded to a clip
    usual_size = (768, 1344, 124)
    instance = "nvidia-l4"  # 18.4 GB of 24, in tiles
    license = "minimax-h3-community-license-agreement"
    license_link = "https://huggingface.co/MiniMaxAI/MiniMax-H3/blob/main/LICENSE"
    weights_mb = 10415
