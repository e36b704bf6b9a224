"""ComfyUI node for remote VAE endpoints. Copy this folder into `custom_nodes`."""

from .nodes import RemoteVAELoader

NODE_CLASS_MAPPINGS = {"RemoteVAELoader": RemoteVAELoader}
NODE_DISPLAY_NAME_MAPPINGS = {"RemoteVAELoader": "Load Remote VAE"}
WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
