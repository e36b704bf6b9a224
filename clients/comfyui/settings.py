"""The user's own endpoints and their token, from the environment or from ComfyUI's settings (`web/settings.js`).

They are not in a workflow, because workflows are shared. A workflow of someone else may name that person's address, so
the token is sent only to the user's own endpoints.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import folder_paths


def endpoints() -> list[str]:
    """Return the URLs, without a slash at the end."""
    text = os.environ.get("REMOTE_VAE_ENDPOINTS") or _setting("RemoteVAE.Endpoints")
    return [url.rstrip("/") for url in text.replace(",", " ").split()]


def token_of(url: str) -> str | None:
    """Return the token for an endpoint. "": none. None: the Hugging Face login (`HF_TOKEN`), for its own hosts."""
    if url not in endpoints():
        return ""
    return os.environ.get("REMOTE_VAE_TOKEN") or _setting("RemoteVAE.Token") or None


def _setting(name: str) -> str:
    """Return a setting of ComfyUI's default user. With `--multi-user`, a node does not know whose workflow it runs."""
    file = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get(name) or "").strip()
    except FileNotFoundError:
        return ""
