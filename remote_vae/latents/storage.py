"""Files of a data set and of its latents: in a folder, at a URL that fsspec opens, or in a shard (.tar)."""

from __future__ import annotations

import os
import stat
import tarfile
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from io import BytesIO
from pathlib import Path, PurePath
from threading import Lock
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from remote_vae.files import write

WHOLE_WRITES = {"hf", "s3", "gs", "az", "memory"}
"""Protocols of fsspec at which a file has its name only after its last byte is written."""

HEADER_BYTES = 1 << 16
"""Bytes to read at a time of an image at a URL, to find its size."""


class Files(ABC):
    """Files by name: a path with `/`, relative to their folder. Threads may share it."""

    @abstractmethod
    def is_file(self, name: PurePath) -> bool: ...

    @abstractmethod
    def open(self, name: PurePath, block_size: int = 1 << 22) -> BinaryIO:
        """Open a file for reading. At a URL, at least `block_size` bytes are requested at a time."""

    @abstractmethod
    def read(self, name: PurePath) -> bytes: ...


class Folder(Files):
    """A folder that can also be listed and written to."""

    location: str

    @abstractmethod
    def walk(self, fail: Callable[[str, Exception], None], skip_link: Callable[[], None] | None) -> Iterator[str]:
        """Yield the names of all files that are not in a hidden folder.

        Args:
            fail: function that gets each folder that cannot be read, and the reason.
            skip_link: function that is called for each linked folder, which is then left out. None: follow it.
        """

    @abstractmethod
    def list(self) -> list[str]:
        """Return the names in this folder, without those in its subfolders."""

    @abstractmethod
    def write(self, name: PurePath, data: bytes, writer: str = "") -> None:
        """Write a file. Its name never stands for half of it.

        Args:
            writer: name that no other run at the time has. Only files that several runs write at a time need it.
        """

    @abstractmethod
    def create(self, name: PurePath) -> BinaryIO:
        """Open a file for writing. At a URL it is written when it is closed."""

    @abstractmethod
    def delete(self, name: PurePath) -> None:
        """Delete a file, if there is one of this name."""


class LocalFolder(Folder):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)

    def is_file(self, name: PurePath) -> bool:
        return os.path.isfile(self.path / name)

    def open(self, name: PurePath, block_size: int = 0) -> BinaryIO:
        path = self.path / name
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a FIFO would block
            raise ValueError("it is not a file, but a FIFO, a socket or a device")
        return open(path, "rb")

    def read(self, name: PurePath) -> bytes:
        with self.open(name) as file:
            return file.read()

    def walk(self, fail: Callable[[str, Exception], None], skip_link: Callable[[], None] | None) -> Iterator[str]:
        yield from self._walk("", frozenset(), fail, skip_link)

    def _walk(
        self,
        folder: str,
        parents: frozenset[tuple[int, int]],
        fail: Callable[[str, Exception], None],
        skip_link: Callable[[], None] | None,
    ) -> Iterator[str]:
        """Yield the files below a folder. A link to one of its parents is not followed."""
        try:
            status = os.stat(self.path / folder)
            with os.scandir(self.path / folder) as entries:
                names = [(entry.name, _is_folder(entry), entry.is_symlink()) for entry in entries]
        except OSError as error:
            fail(folder or ".", error)
            return
        identity = (status.st_dev, status.st_ino)
        if identity in parents:
            return
        for name, is_folder, is_link in names:
            path = os.path.join(folder, name)
            if not is_folder:
                yield path
            elif is_link and skip_link:
                skip_link()
            elif not name.startswith("."):
                yield from self._walk(path, parents | {identity}, fail, skip_link)

    def list(self) -> list[str]:
        return os.listdir(self.path) if self.path.is_dir() else []

    def write(self, name: PurePath, data: bytes, writer: str = "") -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if writer:
            write(path.with_name(f".{writer}{path.suffix}"), data).replace(path)
        else:
            write(path, data)

    def create(self, name: PurePath) -> BinaryIO:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return cast(BinaryIO, path.open("wb", buffering=0))

    def delete(self, name: PurePath) -> None:
        (self.path / name).unlink(missing_ok=True)


class RemoteFolder(Folder):
    """A folder at a URL. Its files are listed once, at the first question about them."""

    def __init__(self, url: str) -> None:
        self.fs, root = _filesystem(url)
        self.location = url.rstrip("/")
        self.root = root.rstrip("/")
        self._lock = Lock()

    @cached_property
    def names(self) -> set[str]:
        with suppress(FileNotFoundError):
            return {name.removeprefix(self.root).lstrip("/") for name in self.fs.find(self.root)}
        return set()

    def is_file(self, name: PurePath) -> bool:
        with self._lock:
            return name.as_posix() in self.names

    def open(self, name: PurePath, block_size: int = 1 << 22) -> BinaryIO:
        return cast(BinaryIO, self.fs.open(self._path(name), "rb", block_size=block_size))

    def read(self, name: PurePath) -> bytes:
        return cast(bytes, self.fs.cat_file(self._path(name)))

    def walk(self, fail: Callable[[str, Exception], None], skip_link: Callable[[], None] | None) -> Iterator[str]:
        for name in self.names:
            if not any(part.startswith(".") for part in name.split("/")[:-1]):
                yield name

    def list(self) -> list[str]:
        return [name for name in self.names if "/" not in name]

    def write(self, name: PurePath, data: bytes, writer: str = "") -> None:
        self._check_writes()
        self.fs.pipe_file(self._path(name), data)
        with self._lock:
            self.names.add(name.as_posix())

    def create(self, name: PurePath) -> BinaryIO:
        self._check_writes()
        return cast(BinaryIO, self.fs.open(self._path(name), "wb"))

    def delete(self, name: PurePath) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm_file(self._path(name))

    def _path(self, name: PurePath) -> str:
        return f"{self.root}/{name.as_posix()}"

    def _check_writes(self) -> None:
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else {*self.fs.protocol}
        if not protocols & WHOLE_WRITES:
            raise ValueError(
                f"{self.location} may hold incomplete files after an interruption: expected a folder or a URL with "
                f"{', '.join(sorted(WHOLE_WRITES))}; write to a folder, and copy it"
            )


class Shard(Files):
    """The files of a .tar, in a folder of its name.

    Attributes:
        error: the reason why its end cannot be read; None if it is whole.
        unsafe: names that lead out of the folder, which are left out.
    """

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._file = file
        weakref.finalize(self, file.close)
        self.members: dict[str, tuple[int, int]] = {}
        """Offset and size of each file, by its name."""
        self.error: Exception | None = None
        self.unsafe: list[str] = []
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    archive.members.clear()  # type: ignore[attr-defined]  # of millions, they take gigabytes
                    path = PurePath(member.name)
                    if path.is_absolute() or ".." in path.parts:
                        self.unsafe.append(member.name)
                    elif member.isreg() and not member.issparse():
                        self.members[(PurePath(name) / path).as_posix()] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError) as error:
            self.error = error

    def is_file(self, name: PurePath) -> bool:
        return name.as_posix() in self.members

    def open(self, name: PurePath, block_size: int = 0) -> BinaryIO:
        return BytesIO(self.read(name))

    def read(self, name: PurePath) -> bytes:
        offset, size = self.members[name.as_posix()]
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) < size:
            raise ValueError("its shard ends in the middle of this file")
        return data


class Shards:
    """Shards by a pattern such as `shards/*.tar`, in a folder or at a URL."""

    def __init__(self, pattern: str) -> None:
        self.location = pattern
        self.fs, path = _filesystem(pattern)
        self.paths = [path] if self.fs.isfile(path) else sorted(map(str, self.fs.glob(path)))
        if not self.paths:
            raise ValueError(f"{pattern} matches no file: expected shards, such as 'shards/*.tar'")
        fixed = path.partition("*")[0]
        self.root = fixed.rpartition("/")[0]

    def name(self, path: str) -> str:
        """Return the name of the folder that a shard's files are in: its own name, without the suffix."""
        return path.removeprefix(self.root).lstrip("/").removesuffix(".tar")

    def open(self, path: str) -> Shard:
        """Read the names in a shard. One at a URL is in a temporary file as long as its files are in use."""
        if isinstance(self.fs, LocalFileSystem):
            return Shard(self.name(path), open(path, "rb"))
        file = tempfile.NamedTemporaryFile()  # noqa: SIM115  # the shard closes it
        self.fs.get_file(path, file.name)
        return Shard(self.name(path), cast(BinaryIO, file))


def open_folder(location: str | Path) -> Folder:
    """Return the folder at a path or a URL. It need not exist.

    Raises:
        ValueError: no installed package opens such URLs.
    """
    if "://" not in str(location):
        return LocalFolder(Path(location))
    fs, path = _filesystem(str(location))
    return LocalFolder(Path(path)) if isinstance(fs, LocalFileSystem) else RemoteFolder(str(location))


def open_data_set(location: str | Path) -> Folder | Shards:
    """Return the folder of images at a path or a URL, or the shards by a pattern that ends in `.tar`.

    Raises:
        ValueError: there is no such folder, or no such shard.
    """
    if str(location).endswith(".tar"):
        return Shards(str(location))
    folder = open_folder(location)
    if isinstance(folder, LocalFolder) and not folder.path.is_dir():
        raise ValueError(
            f"{location} is no folder: expected a folder, a URL such as hf://datasets/you/images, or shards, such as "
            "'shards/*.tar'"
        )
    return folder


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be opened: {error}") from None
    return fs, str(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder, and for a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False
