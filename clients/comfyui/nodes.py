"""The node Load Remote VAE, which replaces Load VAE."""

from __future__ import annotations

from typing import Any

import nodes

from remote_vae import Client, RemoteVAEError

from .settings import endpoints, token_of
from .vae import RemoteVAE, run_cancellable


class RemoteVAELoader:
    """Loader of a `VAE` that runs on an endpoint, for every node that takes one."""

    CATEGORY = nodes.VAELoader.CATEGORY
    """Category of Load VAE: "loaders", or "model/loaders" in newer versions of ComfyUI."""
    DESCRIPTION = "A VAE that runs on a remote VAE endpoint, for every node that takes a VAE."
    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "URL of the endpoint. Empty: the first of Settings > Remote VAE, or of REMOTE_VAE_ENDPOINTS."
        return {"required": {"url": ("STRING", {"default": "", "tooltip": tooltip})}}

    def load(self, url: str) -> tuple[RemoteVAE]:
        own = endpoints()
        url = url.strip().rstrip("/") or (own[0] if own else "")
        if not url:
            raise ValueError("there is no URL: set the URL of an endpoint here or in Settings > Remote VAE")
        client = Client(url, token_of(url))
        try:
            return (RemoteVAE(client, run_cancellable(client, client.config)),)
        except RemoteVAEError as error:
            if error.status not in (401, 403):
                raise
            advice = "your token is not accepted" if url in own else UNLISTED
            raise RemoteVAEError(f"{url} needs a token: {advice}", error.status) from None


UNLISTED = (
    "it is sent only to endpoints in Settings > Remote VAE or REMOTE_VAE_ENDPOINTS, because a workflow may name any "
    "address; this one is not among them"
)
