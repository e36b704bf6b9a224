"""Download of a checkpoint's files from the Hub. Each error is one line that says how to fix it."""

from __future__ import annotations

import json
import time
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # public, and not in its __all__

FILES = ("config.json", "diffusion_pytorch_model.safetensors")
"""Files of a VAE, as diffusers names them."""
INDEX = f"{FILES[1]}.index.json"
"""File with the names of several files of weights, instead of one."""
REACH_SECONDS = 3
"""Seconds in which the Hub must respond. huggingface_hub would try for half a minute."""


def fetch(checkpoint: str, subfolder: str | None, revision: str | None) -> Path:
    """Download `FILES` of a checkpoint, or find them in the cache, and return their folder.

    Raises:
        OSError: the Hub refuses them, or cannot be reached and they are not in the cache.
    """
    at = f" at revision {revision}" if revision else ""
    unreachable = _find_obstacle()

    def download(name: str) -> Path:
        file = "/".join(filter(None, (subfolder, name)))
        return Path(hf_hub_download(checkpoint, file, revision=revision, local_files_only=unreachable is not None))

    name = FILES[0]
    try:
        folder = download(name).parent
        try:
            download(name := FILES[1])
        except EntryNotFoundError:  # also without a network, if the cache does not have the file
            try:
                index = download(INDEX)
            except EntryNotFoundError:
                index = None
            if index is None:
                raise
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
                download(name)
    except Exception as error:  # the HTTP library depends on the version of huggingface_hub
        file = "/".join(filter(None, (subfolder, name)))
        raise OSError(_explain(error, unreachable, checkpoint, file, at)) from error
    return folder


def _find_obstacle() -> str | None:
    """Return why the Hub does not respond; None if it responds, even with an error."""
    for pause in (1, 0):
        try:
            get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
            return None
        except Exception as error:  # as above
            obstacle: BaseException = error
            time.sleep(pause)
    while cause := obstacle.__cause__ or obstacle.__context__:
        obstacle = cause
    return _line(obstacle)


def _explain(error: Exception, unreachable: str | None, checkpoint: str, file: str, at: str) -> str:
    """Return one line about a failed download and how to fix it."""
    page = f"https://huggingface.co/{checkpoint}"
    if isinstance(error, GatedRepoError):
        return f"{checkpoint} is gated: accept its conditions on {page}, then set HF_TOKEN to a token of that account"
    if isinstance(error, RepositoryNotFoundError):
        return f"{checkpoint} is not on the Hub, or the token in HF_TOKEN may not see it: {page}"
    if isinstance(error, RevisionNotFoundError):
        return f"{checkpoint} has no files{at}: {page}"
    if isinstance(error, LocalEntryNotFoundError):
        if unreachable:
            reason = f"the Hub cannot be reached ({unreachable}), and {file} of {checkpoint} is not in the cache"
            return f"{reason}; fix the network, or name a folder with the VAE in VAE_WEIGHTS"
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    elif isinstance(error, EntryNotFoundError):
        return f"{checkpoint} has no {file}{at}: {page}"
    advice = "; is the token in HF_TOKEN right?" if _status(error) in (401, 403) else "; try again later"
    return f"{file} of {checkpoint} could not be downloaded: {_line(error)}{advice}"


def _status(error: Exception) -> int | None:
    """Return the status of the response that became this error; None without a response."""
    return getattr(getattr(error, "response", None), "status_code", None) if isinstance(error, HfHubHTTPError) else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
