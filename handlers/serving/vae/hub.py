"""Download of a checkpoint's files from the Hub. Each error is one line that says how to fix it."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

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
ONE_FILE = "vae.safetensors"
"""Name of a user's file of weights, without a config, in the folder of a deployed model."""
REACH_SECONDS = 3
"""Seconds in which the Hub must respond. huggingface_hub would try for half a minute."""


class Repository(NamedTuple):
    """A checkpoint on the Hub, as a user names it: `org/repo[:subfolder][@revision]`."""

    name: str
    subfolder: str | None
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> Repository | None:
        """Return the parts of a name; None for text that is none."""
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?(?:@([\w./-]+))?", text)
        return cls(*match.groups()) if match and not text.startswith(".") else None


def names_file(source: object) -> bool:
    """Return whether a user's name of weights is one file of a repository: `org/repo:anime.safetensors`."""
    return isinstance(source, Repository) and (source.subfolder or "").endswith(".safetensors")


def fetch(checkpoint: str, subfolder: str | None, revision: str | None) -> Path:
    """Download `FILES` of a checkpoint, or find them in the cache, and return their folder.

    Raises:
        OSError: the Hub refuses them, or cannot be reached and they are not in the cache.
    """
    download = _Download(checkpoint, subfolder, revision)
    folder = download.file(FILES[0]).parent
    if index := download.file_if_present(FILES[1], INDEX):
        for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            download.file(name)
    return folder


def fetch_file(checkpoint: str, subfolder: str | None, name: str, revision: str | None) -> Path:
    """Download one file of a checkpoint, or find it in the cache. `fetch` lists the errors."""
    return _Download(checkpoint, subfolder, revision).file(name)


class _Download:
    """Download of files of one folder of a checkpoint."""

    def __init__(self, checkpoint: str, subfolder: str | None, revision: str | None) -> None:
        self.checkpoint, self.subfolder, self.revision = checkpoint, subfolder, revision
        self.unreachable = _find_obstacle()

    def file(self, name: str) -> Path:
        try:
            return self._path(name)
        except Exception as error:  # the HTTP library depends on the version of huggingface_hub
            raise self._explain(error, name) from error

    def file_if_present(self, name: str, instead: str) -> Path | None:
        """Download a file, or the one that a checkpoint has instead of it. Return the latter; None for the former."""
        try:
            self._path(name)
            return None
        except EntryNotFoundError as error:  # also for a file that is not in the cache, without a network
            with suppress(EntryNotFoundError):
                return self._path(instead)
            raise self._explain(error, name) from error
        except Exception as error:  # as above
            raise self._explain(error, name) from error

    def _path(self, name: str) -> Path:
        offline = self.unreachable is not None
        return Path(
            hf_hub_download(
                self.checkpoint, self._in_checkpoint(name), revision=self.revision, local_files_only=offline
            )
        )

    def _in_checkpoint(self, name: str) -> str:
        return "/".join(filter(None, (self.subfolder, name)))

    def _explain(self, error: Exception, name: str) -> OSError:
        at = f" at revision {self.revision}" if self.revision else ""
        return OSError(_explain(error, self.unreachable, self.checkpoint, self._in_checkpoint(name), at))


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
