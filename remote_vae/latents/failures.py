"""The list of files that could not be encoded. It is written line by line, so a run of any length takes no memory."""

from __future__ import annotations

import os
from pathlib import PurePath
from threading import Lock
from typing import BinaryIO

from remote_vae.latents.storage import Folder


class Failures:
    """A file with a line for each failed file: the bytes of its name, line breaks escaped, a tab, and the reason.

    Threads may share it. It replaces the list of an earlier run. A list at a URL is written when it is closed.
    """

    def __init__(self, folder: Folder, name: PurePath) -> None:
        self.folder, self.name = folder, name
        self.location = f"{folder.location}/{name.as_posix()}"
        self.count = 0
        self._file: BinaryIO | None = None
        self._is_closed = False
        self._lock = Lock()

    def add(self, name: str, error: Exception) -> None:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        line = os.fsencode(name.translate({ord("\n"): r"\n", ord("\t"): r"\t"})) + b"\t"
        with self._lock:
            if self._is_closed:  # the run has ended before this file
                return
            if self._file is None:
                self._file = self.folder.create(self.name)
            self.count += 1
            self._file.write(line + reason.encode(errors="backslashreplace") + b"\n")

    def close(self) -> None:
        """Close the list. Remove that of an earlier run if nothing failed in this one."""
        with self._lock:
            self._is_closed = True
            if self._file:
                self._file.close()
            else:
                self.folder.delete(self.name)
