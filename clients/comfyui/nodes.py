"""The node that stands where Load VAE does."""

from __future__ import annotations

from typing import Any

import nodes

from remote_vae import Client, RemoteVAEError

from .settings import endpoints, token_of
from .vae import RemoteVAE, cancellable


class RemoteVAELoader:
    """A `VAE` for every node that takes one, whose passes run on an endpoint."""

    CATEGORY = nodes.VAELoader.CATEGORY
    """That of Load VAE: "loaders", and "model/loaders" in newer versions of ComfyUI."""
    DESCRIPTION = "A VAE that runs on a remote VAE endpoint, for every node that takes a VAE."
    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "Of the endpoint. Empty: the first one of Settings > Remote VAE, or of REMOTE_VAE_ENDPOINTS."
        return {"required": {"url": ("STRING", {"default": "", "tooltip": tooltip})}}

    def load(self, url: str) -> tuple[RemoteVAE]:
        own = endpoints()
        url = url.strip().rstrip("/") or (own[0] if own else "")
        if not url:
            raise ValueError("give the URL of an endpoint, here or in Settings > Remote VAE")
        client = Client(url, token_of(url))
        try:
            return (RemoteVAE(client, cancellable(client.config)),)
        except RemoteVAEError as error:
            if error.status not in (401, 403):
                raise
            advice = "your token is not taken" if url in own else OWN_ALONE
            raise RemoteVAEError(f"{url} needs a token: {advice}", error.status) from None


OWN_ALONE = (
    "it goes to the endpoints of Settings > Remote VAE or REMOTE_VAE_ENDPOINTS alone, as anybody's workflow may name "
    "any address, and this one is not among them"
)
