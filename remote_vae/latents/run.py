"""Encoding of a folder of images, many at a time. Files are written whole or not at all, so a run can be continued."""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from itertools import islice, repeat
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
from remote_vae.latents.failures import Failures
from remote_vae.latents.format import Encoded, Format, ImageFile
from remote_vae.latents.storage import (
    HEADER_BYTES,
    Files,
    Folder,
    RemoteFolder,
    Shards,
    open_data_set,
    open_folder,
)
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


Window = tuple[Files, list[str]]
"""Names of images, and the folder or shard that they are in."""

ReadAll = Callable[[Iterable[Files], Iterable[str]], Iterable["ImageFile | None"]]
"""`map` of `_read_header`, in one thread or in several."""


@dataclass
class Group:
    """Images whose latents are written together."""

    images: list[ImageFile]
    results: list[list[Encoded]] = field(default_factory=list)


class Run:
    """One run over a data set, or over one part of it. It encodes the images whose latents are not stored yet.

    Args:
        config: config of the endpoint.
        data_set: folder, URL of a folder, or pattern of shards such as `shards/*.tar`.
        out: folder, or URL of one.
        seed: seed of samples; each image's own seed also depends on its name.
        workers: images in flight at a time.
        shard: number of this part, from 1, and number of parts. The part of a file, or of a shard of the data set,
            depends on its name alone.
    """

    def __init__(
        self,
        client: AnyClient,
        config: dict[str, Any],
        data_set: str | Path,
        out: str | Path,
        format: Format,
        seed: int,
        workers: int,
        shard: tuple[int, int] = (1, 1),
    ) -> None:
        self.client, self.format = client, format
        self.data_set, self.out = open_data_set(data_set), open_folder(out)
        self.seed, self.workers, self.shard = seed, workers, shard
        self.is_video = config["kind"] == "video"
        self.name = format.set_name if shard[1] == 1 else f"{format.set_name}.{shard[0]}-of-{shard[1]}"
        """Name of the run's own files. Runs that write to one folder at a time have different names."""
        self.failures = Failures(self.out, Path(STATE_FOLDER, f"{self.name}.failed.txt"))
        self.skipped: Counter[str] = Counter()
        """Files and folders that the trainer does not load, by type."""
        self.found = 0
        """Images of all parts of the data set."""
        self.total = 0
        """Images of this part, as far as they are found."""
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
        if isinstance(self.data_set, Shards):
            windows = self._read_shards(self.data_set, files)
        else:
            self._check_found()
            self.total = len(files)
            windows = ((self.data_set, window) for window in _windows(files))
        self._check_settings()
        columns = (
            TextColumn("encoding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        workers, reader, headers = (ThreadPoolExecutor(count) for count in (self.workers, 1, self.workers))
        read = self._read_header
        read_all = partial(headers.map, read) if isinstance(self.data_set, RemoteFolder) else partial(map, read)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=self.total, speed="")
            try:
                self.format.prepare(self.out, self.name)
                shown = 0.0
                for is_last in self._encode(workers, self._groups(reader, read_all, windows)):
                    if is_last or monotonic() - shown > SHOW_INTERVAL:
                        shown, speed = monotonic(), progress.tasks[0].speed
                        done = min(self.encoded + self.already_stored + self.failures.count, self.total)
                        text = f"{speed:.1f} images/s" if speed else ""
                        progress.update(task, completed=done, total=self.total, speed=text)
            finally:
                for pool in (workers, reader, headers):
                    pool.shutdown(wait=False, cancel_futures=True)  # images in flight are not waited for
                self.failures.close()

    def skipped_summary(self) -> str:
        """Return a sentence about the files that the trainer does not load; empty if there are none."""
        types = ", ".join(f"{count} {name}" for name, count in sorted(self.skipped.items()))
        return f"skipped, because {self.format.trainer} does not load them: {types}" if types else ""

    def find(self) -> list[str]:
        """Return this shard's images below the folder, relative to it. Files that differ in their suffix are neighbors.

        The names of a million files take about 100 MB. For a data set of shards, return the paths of those.
        """
        if isinstance(self.data_set, Shards):
            return list(filter(self._is_mine, self.data_set.paths))
        skip_link = None if self.format.follows_links else lambda: self.skipped.update(["linked folder"])
        return _sorted(filter(self._is_mine, self._images(self.data_set.walk(self.failures.add, skip_link))))

    def _is_mine(self, name: str) -> bool:
        number, shards = self.shard
        return zlib.crc32(os.fsencode(_stem(name))) % shards == number - 1

    def _images(self, names: Iterable[str]) -> Iterator[str]:
        """Yield the names that the trainer loads. Count these, and the images that it does not load."""
        Image.preinit()  # the usual types come first, and are tried first
        media = MEDIA | Image.registered_extensions().keys()
        for name in names:
            relative = Path(name)
            is_hidden, suffix = relative.name.startswith("."), relative.suffix
            if not is_hidden and self.format.loads(relative):
                self.found += 1
                yield name
            elif suffix.lower() in media:
                self.skipped[f"hidden {suffix}" if is_hidden else suffix] += 1

    def _check_found(self) -> None:
        if not self.found and not self.failures.count:
            suffixes = ", ".join(sorted(self.format.suffixes))
            where = f"{self.data_set.location} has no image that {self.format.trainer} loads"
            message = f"{where}: expected files with {suffixes}"
            raise ValueError("; ".join(filter(None, [message, self.skipped_summary()])))

    def _check_settings(self) -> None:
        """Compare the settings with those of earlier runs into this folder, and save them.

        Raises:
            ValueError: the settings differ, so the files could be mistaken for those of an earlier run.
        """
        file = Path(STATE_FOLDER, f"{self.format.set_name}.json")
        settings = {"format": type(self.format).__name__, "seed": self.seed, **asdict(self.format)}
        settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        del settings["arch"]  # it is in the file's name
        if self.format.mixes_resolutions:
            del settings["resolution"]
        earlier = _read_settings(self.out, file) if self.out.is_file(file) else settings
        earlier = {"i2v": False, **earlier}  # earlier versions had no such option
        changed = [f"{name}={earlier.get(name)}" for name in settings if earlier.get(name) != settings[name]]
        if changed:
            options = ", ".join(changed)
            raise ValueError(
                f"{self.out.location} has latents that were made with {options}; use the same, or another --out"
            )
        self.out.write(file, json.dumps(settings).encode(), writer=self.name)

    def _read_shards(self, shards: Shards, paths: list[str]) -> Iterator[Window]:
        """Yield windows of the images in shards, one shard after the other. List a damaged shard as failed."""
        for path in paths:
            try:
                shard = shards.open(path)
            except Exception as error:  # each file system of fsspec has its own
                self.failures.add(path, error)
                continue
            images = _sorted(self._images(shard.members))
            self.total += len(images)
            for window in _windows(images):
                yield shard, window
            for name in shard.unsafe:
                self.failures.add(f"{path}/{name}", ValueError("its name leads out of the shard; rename it"))
            if shard.error:
                self.failures.add(path, shard.error)
        if self.shard[1] == 1:  # one part of several may have no image
            self._check_found()

    def _groups(self, reader: ThreadPoolExecutor, read_all: ReadAll, windows: Iterator[Window]) -> Iterator[Group]:
        """Yield groups of images that are not stored yet. Read the sizes of one window of files ahead."""

        def read_next() -> list[Group] | None:
            window = next(windows, None)
            return self._read_window(read_all, window) if window else None

        ahead = reader.submit(read_next)
        while (groups := ahead.result()) is not None:
            ahead = reader.submit(read_next)
            yield from groups

    def _read_window(self, read_all: ReadAll, window: Window) -> list[Group]:
        """Return the images of a window that are not stored yet, in groups that are written together."""
        owners: dict[Path, Path] = {}
        images: list[ImageFile] = []
        files, names = window
        for image in filter(None, read_all(repeat(files), names)):
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

    def _read_header(self, files: Files, name: str) -> ImageFile | None:
        """Read the size of an image. Return None, and list the image as failed, if it has none."""
        path = Path(name)
        try:
            with files.open(path, HEADER_BYTES) as file:
                return ImageFile(files, path, self.format.place(self.format.read_size(file), path))
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

        Clips of a video that have files of their own are written at once, and nothing is returned.
        """
        encoded: list[Encoded] = []
        part = None
        try:
            for part, latents, first in self._encode_parts(image):
                flipped = latents[1] if self.format.flip else None
                caption = self.format.caption(image)
                encoded.append(Encoded(part, latents[0], flipped, caption, None if first is None else first[0]))
                if part.clip and self.format.images_per_file == 1:
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
            elif not encoded:  # the clips are written
                self.encoded += 1
        return encoded

    def _encode_parts(self, image: ImageFile) -> Iterator[tuple[ImageFile, Tensor, Tensor | None]]:
        """Yield an image, or the clips of a video, with the latents and, for image-to-video, those of the first frame.

        The latents are those of one image, or with `flip` of two.
        An image that needs no change is sent as its file: it has fewer bytes than its pixels, and is not decoded here.
        """
        if file := self.format.jpeg(image):
            try:
                latents = tensors.encode_jpeg(self.client, file, image.placement.bucket, **self._parameters(image))
            except RemoteVAEError as error:
                if error.status not in IMAGE_ERRORS or isinstance(error, Paused):
                    raise
            else:
                yield image, self._without_frames(latents), None
                return
        for part, pixels in self.format.parts(image, self.out):
            latents = self._encode_pixels(part, pixels)
            first = self.format.first_frame(pixels) if part.clip else None
            yield part, latents, None if first is None else self._encode_pixels(part, first)

    def _encode_pixels(self, part: ImageFile, pixels: np.ndarray[Any, Any]) -> Tensor:
        """Return the latents of pixels [B, H, W, 3], or [F, H, W, 3] of a clip."""
        batch = torch.from_numpy(pixels)
        if self.format.architecture.unit_range:
            batch = batch.float() / 255
        if part.clip:
            batch = batch.movedim(-1, 0).unsqueeze(0).contiguous()
        elif self.is_video:  # an image is a video of one frame
            batch = batch.movedim(-1, 1).unsqueeze(2).contiguous()
        return self._without_frames(tensors.encode(self.client, batch, **self._parameters(part)))

    def _without_frames(self, latents: Tensor) -> Tensor:
        """Return latents without the dimension of frames if the trainer stores none."""
        self.endpoint_errors = 0
        has_frames = latents.ndim == 5 and not self.format.architecture.has_frames
        return latents.squeeze(2) if has_frames else latents

    def _parameters(self, part: ImageFile) -> dict[str, Any]:
        """Return the parameters of the request that encodes an image or a clip."""
        parameters: dict[str, Any] = {
            "sample_mode": self.format.sample_mode,
            "do_scaling": self.format.normalized,
            "latents_layout": self.format.architecture.layout,
        }
        if self.format.sample_mode == "sample":
            name = f"{part.relative.as_posix()} {part.clip}" if part.clip else part.relative.as_posix()
            parameters["seed"] = self.seed ^ zlib.crc32(name.encode(errors="surrogateescape"))
        return parameters

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
                self.encoded += len({each.image.relative for each in encoded})
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            for each in encoded:
                self.failures.add(str(each.image.relative), error)

    def _write_files(self, encoded: list[Encoded]) -> None:
        files = self.format.files([each.image for each in encoded])
        for file, data in zip(files, self.format.contents(encoded, self.out), strict=True):
            self.out.write(file, data)


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


def _sorted(images: Iterable[str]) -> list[str]:
    """Return names in an order in which files that differ in their suffix are neighbors."""
    return sorted(sorted(images), key=_stem)


def _read_settings(out: Folder, file: Path) -> dict[str, Any]:
    """Return the settings of the run that wrote this file."""
    try:
        settings = json.loads(out.read(file))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        name = f"{out.location}/{file}"
        raise ValueError(f"{name} is damaged; delete it if the latents beside it were made with the same options")
    return settings
