"""Client of remote VAE endpoints. `pipe.vae = RemoteVAE(url)` runs the VAE of a diffusers pipeline elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from remote_vae.client import Client, RemoteVAEError

if TYPE_CHECKING:
    from remote_vae.vae import RemoteVAE

__all__ = ["Client", "RemoteVAE", "RemoteVAEError"]


def __getattr__(name: str) -> Any:
    """Import `RemoteVAE` when it is used: diffusers takes seconds to import, and the command does not need it."""
    if name == "RemoteVAE":
        from remote_vae.vae import RemoteVAE

        return RemoteVAE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
