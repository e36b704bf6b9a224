"""A VAE that runs elsewhere, where a pipeline of diffusers takes one of its own: `pipe.vae = RemoteVAE(url)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from remote_vae.client import Client, RemoteVAEError

if TYPE_CHECKING:
    from remote_vae.vae import RemoteVAE

__all__ = ["Client", "RemoteVAE", "RemoteVAEError"]


def __getattr__(name: str) -> Any:
    """diffusers takes seconds to import, and the command needs none of it."""
    if name == "RemoteVAE":
        from remote_vae.vae import RemoteVAE

        return RemoteVAE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
