"""Node for `comfyui_run.py`: ComfyUI's VAE with diffusers' model, on this computer."""

from pathlib import Path

import comfy.sd
import diffusers
import torch


class LocalModel(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model.eval()

    def encode(self, pixels):
        return self.model.encode(pixels).latent_dist.mode()

    def decode(self, latents):
        return self.model.decode(latents).sample


class LocalVAE:
    CATEGORY, RETURN_TYPES, FUNCTION = "loaders", ("VAE",), "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"folder": ("STRING", {})}}

    def load(self, folder):
        config = diffusers.AutoencoderKL.load_config(folder)
        model = getattr(diffusers, config["_class_name"]).from_pretrained(Path(folder))
        vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
        vae.first_stage_model = LocalModel(model)
        vae.latent_channels = 16 if "z_dim" in config else config["latent_channels"]
        vae.upscale_ratio = vae.downscale_ratio = (
            8 if "z_dim" in config else 2 ** (len(config["block_out_channels"]) - 1)
        )
        if "z_dim" in config:  # factors of Wan
            vae.latent_dim = 3
            vae.upscale_ratio = (lambda frames: 4 * frames - 3, 8, 8)
            vae.downscale_ratio = (lambda frames: (frames + 3) // 4, 8, 8)
            vae.upscale_index_formula = vae.downscale_index_formula = (4, 8, 8)
        vae.memory_used_decode = vae.memory_used_encode = lambda shape, dtype: 1
        return (vae,)


NODE_CLASS_MAPPINGS = {"LocalVAE": LocalVAE}
