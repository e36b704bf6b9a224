"""Encoding of a folder of images, many at a time. Files are written whole or not at all, so a run can be continued."""

from __future__ import annotations

import errno
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from time import monotonic
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from remote_vae import tensors
from remote_vae.client import ConnectionBroken, NoResponse, Paused, RemoteVAEError
from remote_vae.files import write
from remote_vae.latents.failures import Failures
from remote_vae.latents.format import Encoded, Format, ImageFile
from remote_vae.pool import AnyClient

STATE_FOLDER = ".remote-vae"
"""Folder of the command's own files in the output folder. Trainers skip it, because its name begins with a dot."""
PLUGINS = {".avif": ("pillow_avif", "pillow-avif-plugin"), ".jxl": ("pillow_jxl", "pillow-jxl-plugin")}
"""Module that lets Pillow read a type of file, and its package. The trainers use the same."""
MEDIA = {".avif", ".heic", ".heif", ".jxl", ".svg", ".avi", ".mkv", ".mov", ".mp4", ".webm"}
"""Suffixes in addition to Pillow's. A run reports how many files with these it skipped."""
IMAGE_ERRORS = (400, 413, 422)
"""Statuses that concern one image."""
MAX_ENDPOINT_ERRORS = 10
"""Images that fail one after the other, such as with status 500, until a gray image shows if the endpoint works."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Errors with which no file can be written. They end the run."""
SHOW_INTERVAL = 0.1
"""Seconds between two updates of the progress bar."""
WINDOW = 1000
"""Files whose sizes are read ahead, to encode images of one size together. It bounds the memory of a run."""


@dataclass
class Group:
    """Images whose latents are written together."""

    images: list[ImageFile]
    results: list[list[Encoded]] = field(default_factory=list)


class Run:
    """One run over a folder of images, or over one shard of it. It encodes those whose latents are not stored yet.

    Args:
        config: config of the endpoint.
        seed: seed of samples; each image's own seed also depends on its name.
        workers: images in flight at a time.
        shard: number of this shard, from 1, and number of shards. A file's shard depends on its name alone.
    """

    def __init__(
        self,
        client: AnyClient,
        config: dict[str, Any],
        folder: Path,
        out: Path,
        format: Format,
        seed: int,
        workers: int,
        shard: tuple[int, int] = (1, 1),
    ) -> None:
        self.client, self.folder, self.out, self.format = client, folder, out, format
        self.seed, self.workers, self.shard = seed, workers, shard
        self.is_video = config["kind"] == "video"
        self.name = format.set_name if shard[1] == 1 else f"{format.set_name}.{shard[0]}-of-{shard[1]}"
        """Name of the run's own files. Runs that write to one folder at a time have different names."""
        self.failures = Failures(out / STATE_FOLDER / f"{self.name}.failed.txt")
        self.skipped: Counter[str] = Counter()
        """Files and folders that the trainer does not load, by type."""
        self.found = 0
        """Images of all shards."""
        self.encoded = 0
        self.already_stored = 0
        """Images whose latents were stored before."""
        self.endpoint_errors = 0
        self.lock = Lock()

    def encode(self, console: Console) -> None:
        """Encode the images.

        Raises:
            ValueError: there is no image, or the output folder has latents that were made with other options.
            RemoteVAEError: the endpoint cannot be reached, or refuses all images.
        """
        for module, _ in PLUGINS.values():
            with suppress(ImportError):
                import_module(module)
        files = self.find()
        if not self.found and not self.failures.count:
            suffixes = ", ".join(sorted(self.format.suffixes))
            message = f"{self.folder} has no image that {self.format.trainer} loads: expected files with {suffixes}"
            raise ValueError("; ".join(filter(None, [message, self.skipped_summary()])))
        self._check_settings()
        columns = (
            TextColumn("encoding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        workers, reader = ThreadPoolExecutor(self.workers), ThreadPoolExecutor(1)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(files), speed="")
            try:
                self.format.prepare(self.out, self.name)
                shown = 0.0
                for is_last in self._encode(workers, self._groups(reader, files)):
                    if is_last or monotonic() - shown > SHOW_INTERVAL:
                        shown, speed = monotonic(), progress.tasks[0].speed
                        done = min(self.encoded + self.already_stored + self.failures.count, len(files))
                        progress.update(task, completed=done, speed=f"{speed:.1f} images/s" if speed else "")
            finally:
                for pool in (workers, reader):
                    pool.shutdown(wait=False, cancel_futures=True)  # images in flight are not waited for
                self.failures.close()

    def skipped_summary(self) -> str:
        """Return a sentence about the files that the trainer does not load; empty if there are none."""
        types = ", ".join(f"{count} {name}" for name, count in sorted(self.skipped.items()))
        return f"skipped, because {self.format.trainer} does not load them: {types}" if types else ""

    def find(self) -> list[str]:
        """Return this shard's images below the folder, relative to it. Files that differ in their suffix are neighbors.

        The names of a million files take about 100 MB.
        """
        images = []
        media = MEDIA | Image.registered_extensions().keys()
        number, shards = self.shard
        for path in self._walk(""):
            relative = Path(path)
            is_hidden, suffix = relative.name.startswith("."), relative.suffix
            if not is_hidden and self.format.loads(relative):
                self.found += 1
                if zlib.crc32(os.fsencode(_stem(path))) % shards == number - 1:
                    images.append(path)
            elif suffix.lower() in media:
                self.skipped[f"hidden {suffix}" if is_hidden else suffix] += 1
        images.sort()
        images.sort(key=_stem)
        return images

    def _walk(self, folder: str, parents: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
        """Yield the files below a folder. A link to one of its parents is not followed."""
        try:
            status = os.stat(self.folder / folder)
            with os.scandir(self.folder / folder) as entries:
                names = [(entry.name, _is_folder(entry), entry.is_symlink()) for entry in entries]
        except OSError as error:
            self.failures.add(folder or ".", error)
            return
        identity = (status.st_dev, status.st_ino)
        if identity in parents:
            return
        for name, is_folder, is_link in names:
            path = os.path.join(folder, name)
            if not is_folder:
                yield path
            elif is_link and not self.format.follows_links:
                self.skipped["linked folder"] += 1
            elif not name.startswith("."):
                yield from self._walk(path, parents | {identity})

    def _check_settings(self) -> None:
        """Compare the settings with those of earlier runs into this folder, and save them.

        Raises:
            ValueError: the settings differ, so the files could be mistaken for those of an earlier run.
        """
        file = self.out / STATE_FOLDER / f"{self.format.set_name}.json"
        settings = {"format": type(self.format).__name__, "seed": self.seed, **asdict(self.format)}
        settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        del settings["arch"]  # it is in the file's name
        if self.format.mixes_resolutions:
            del settings["resolution"]
        earlier = _read_settings(file) if file.exists() else settings
        changed = [f"{name}={earlier.get(name)}" for name in settings if earlier.get(name) != settings[name]]
        if changed:
            options = ", ".join(changed)
            raise ValueError(f"{self.out} has latents that were made with {options}; use the same, or another --out")
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file.with_name(f".{self.name}.json"), json.dumps(settings).encode()).replace(file)

    def _groups(self, reader: ThreadPoolExecutor, files: list[str]) -> Iterator[Group]:
        """Yield groups of images that are not stored yet. Read the sizes of one window of files ahead."""
        ahead: Future[list[Group]] | None = None
        for window in chain(_windows(files), [None]):
            following = reader.submit(self._read_window, window) if window else None
            if ahead:
                yield from ahead.result()
            ahead = following

    def _read_window(self, files: list[str]) -> list[Group]:
        """Return the images of a window that are not stored yet, in groups that are written together."""
        owners: dict[Path, Path] = {}
        images: list[ImageFile] = []
        for image in filter(None, map(self._read_header, files)):
            try:
                owner = owners.setdefault(self.format.name(image), image.relative)
                if owner != image.relative:
                    raise ValueError(f"its latents would have the same name as those of {owner}; rename the image")
                if self.format.is_stored(self.out, image):
                    self.already_stored += 1
                else:
                    images.append(image)
            except (OSError, ValueError) as error:
                self.failures.add(str(image.relative), error)
        size = self.format.images_per_file
        groups = [Group(images[start : start + size]) for start in range(0, len(images), size)]
        if not groups:
            return [Group([])]  # shows progress
        return sorted(groups, key=lambda group: group.images[0].placement.bucket)  # for batches of one size

    def _read_header(self, name: str) -> ImageFile | None:
        """Read the size of an image. Return None, and list the image as failed, if it has none."""
        path = self.folder / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # to open a FIFO would block
                raise ValueError("it is not a file, but a FIFO, a socket or a device")
            return ImageFile(path, Path(name), self.format.place(self.format.read_size(path)))
        except Exception as error:  # Pillow raises a dozen types for damaged files
            reason = error
            if isinstance(error, UnidentifiedImageError) and (plugin := PLUGINS.get(path.suffix.lower())):
                reason = ValueError(f"{error}; if Pillow does not read {path.suffix} here, `pip install {plugin[1]}`")
            self.failures.add(name, reason)
            return None

    def _encode(self, workers: ThreadPoolExecutor, groups: Iterator[Group]) -> Iterator[bool]:
        """Keep all workers busy and few images in memory. Yield when an image or a window is done: True at the end."""
        jobs = _jobs(groups)
        running: dict[Future[list[Encoded]], Group] = {}
        done: SimpleQueue[Future[list[Encoded]]] = SimpleQueue()
        while True:
            following = list(islice(jobs, 2 * self.workers - len(running)))
            for group, image in following:
                if image:
                    future = workers.submit(self._encode_file, image)
                    running[future] = group
                    future.add_done_callback(done.put)
            yield not (running or following)
            if running:
                future = done.get()
                group = running.pop(future)
                group.results.append(future.result())
                if len(group.results) == len(group.images):
                    self._write(group)
            elif not following:
                return

    def _encode_file(self, image: ImageFile) -> list[Encoded]:
        """Encode an image. Return nothing, and list it as failed, if that is impossible.

        The clips of a video are written at once, and nothing is returned.
        """
        encoded: list[Encoded] = []
        part = None
        try:
            for part, pixels in self.format.parts(image, self.out):
                encoded.append(Encoded(part, *self._encode_pixels(part, pixels), self.format.caption(image)))
                if part.clip:
                    self._write_files(encoded)
                    encoded.clear()
        except RemoteVAEError as error:
            self._check_endpoint(error)
            self.failures.add(str(image.relative), error)
            return []
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            self.failures.add(str(image.relative), error)
            return []
        with self.lock:
            if part is None:
                self.already_stored += 1
            elif part.clip:
                self.encoded += 1
        return encoded

    def _encode_pixels(self, part: ImageFile, pixels: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor | None]:
        """Return the latents of an image or a clip, and with `flip` those of its mirror image."""
        batch = torch.from_numpy(pixels)
        if part.clip:
            batch = batch.movedim(-1, 0).unsqueeze(0).contiguous()
        elif self.is_video:  # an image is a video of one frame
            batch = batch.movedim(-1, 1).unsqueeze(2).contiguous()
        parameters: dict[str, Any] = {
            "sample_mode": self.format.sample_mode,
            "do_scaling": self.format.normalized,
            "latents_layout": self.format.architecture.layout,
        }
        if self.format.sample_mode == "sample":
            name = f"{part.relative.as_posix()} {part.clip}" if part.clip else part.relative.as_posix()
            parameters["seed"] = self.seed ^ zlib.crc32(name.encode(errors="surrogateescape"))
        latents = tensors.encode(self.client, batch, **parameters)
        self.endpoint_errors = 0
        if latents.ndim == 5 and not self.format.architecture.has_frames:
            latents = latents.squeeze(2)
        return latents[0], latents[1] if self.format.flip else None

    def _check_endpoint(self, error: RemoteVAEError) -> None:
        """Raise the error unless it may concern one image alone."""
        if error.status in IMAGE_ERRORS and not isinstance(error, Paused):
            return
        if error.status not in (500, 504) and not isinstance(error, ConnectionBroken | NoResponse):
            raise error
        self.endpoint_errors += 1
        if self.endpoint_errors >= MAX_ENDPOINT_ERRORS:
            gray = torch.full((1, 256, 256, 3), 128, dtype=torch.uint8)
            try:
                tensors.encode(self.client, gray.movedim(-1, 1).unsqueeze(2).contiguous() if self.is_video else gray)
            except RemoteVAEError:
                raise error from None
            self.endpoint_errors = 0

    def _write(self, group: Group) -> None:
        """Write the files of a group, in its order. The results lack images that failed."""
        encoded = [each for result in group.results for each in result]
        if not encoded:
            return
        order = {image.relative: index for index, image in enumerate(group.images)}
        encoded.sort(key=lambda each: order[each.image.relative])
        try:
            self._write_files(encoded)
            with self.lock:
                self.encoded += len(encoded)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            for each in encoded:
                self.failures.add(str(each.image.relative), error)

    def _write_files(self, encoded: list[Encoded]) -> None:
        paths = [self.out / file for file in self.format.files([each.image for each in encoded])]
        for path, data in zip(paths, self.format.contents(encoded, paths), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, data)


def _jobs(groups: Iterator[Group]) -> Iterator[tuple[Group, ImageFile | None]]:
    """Yield each image with its group, and None for a group without images."""
    for group in groups:
        if not group.images:
            yield group, None
        for image in group.images:
            yield group, image


def _windows(files: list[str]) -> Iterator[list[str]]:
    """Yield windows of files. Neighbors with one stem are in one window."""
    start = 0
    while start < len(files):
        end = start + WINDOW
        while end < len(files) and _stem(files[end]) == _stem(files[end - 1]):
            end += 1
        yield files[start:end]
        start = end


def _stem(file: str) -> str:
    """Return what the names of two images have in common if their latents could have the same name."""
    return os.path.splitext(file)[0].replace(".", "_")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder, and for a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _read_settings(file: Path) -> dict[str, Any]:
    """Return the settings of the run that wrote this file."""
    try:
        settings = json.loads(file.read_bytes())
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is damaged; delete it if the latents beside it were made with the same options")
    return settings
