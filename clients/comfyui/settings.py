"""The user's own endpoints and their token: from the environment, else from ComfyUI's settings (`web/settings.js`).

They are not in a workflow, which is shared with others. A workflow that comes from others may name their address in
turn, so a token goes to the user's own endpoints alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import folder_paths


def endpoints() -> list[str]:
    """URLs, without the slash at their end."""
    text = os.environ.get("REMOTE_VAE_ENDPOINTS") or _setting("RemoteVAE.Endpoints")
    return [url.rstrip("/") for url in text.replace(",", " ").split()]


def token_of(url: str) -> str | None:
    """Of an endpoint: "" is none, and None is the Hugging Face login (`HF_TOKEN`), for Hugging Face's own hosts."""
    if url not in endpoints():
        return ""
    return os.environ.get("REMOTE_VAE_TOKEN") or _setting("RemoteVAE.Token") or None


def _setting(name: str) -> str:
    """Of ComfyUI's one user; with `--multi-user` a node does not know whose workflow it runs."""
    file = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get(name) or "").strip()
    except FileNotFoundError:
        return ""
