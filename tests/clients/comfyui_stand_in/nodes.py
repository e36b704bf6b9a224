"""ComfyUI's own nodes."""


class VAELoader:
    CATEGORY = "model/loaders"
