"""Encoding of a folder of images, many at a time. Files are written whole or not at all, so a run can be continued."""

from __future__ import annotations

import errno
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from remote_vae import tensors
from remote_vae.client import Client, RemoteVAEError
from remote_vae.files import write
from remote_vae.latents.format import Encoded, Format, ImageFile

STATE_FOLDER = ".remote-vae"
"""Folder of the command's own files in the output folder. Trainers skip it, because its name begins with a dot."""
PLUGINS = {".avif": ("pillow_avif", "pillow-avif-plugin"), ".jxl": ("pillow_jxl", "pillow-jxl-plugin")}
"""Module that lets Pillow read a type of file, and its package. The trainers use the same."""
MEDIA = {".avif", ".heic", ".heif", ".jxl", ".svg", ".avi", ".mkv", ".mov", ".mp4", ".webm"}
"""Suffixes in addition to Pillow's. A run reports how many files with these it skipped."""
IMAGE_ERRORS = (400, 413, 422)
"""Statuses that concern one image. All others end the run."""


class Run:
    """One run over a folder of images. It encodes those whose latents are not stored yet.

    Args:
        config: config of the endpoint.
        seed: seed of samples; each image's own seed also depends on its name.
        workers: images in flight at a time.
    """

    def __init__(
        self, client: Client, config: dict[str, Any], folder: Path, out: Path, format: Format, seed: int, workers: int
    ) -> None:
        self.client, self.folder, self.out, self.format = client, folder, out, format
        self.seed, self.workers = seed, workers
        self.is_video = config["kind"] == "video"
        self.failed: dict[Path, str] = {}
        """Reasons by the relative path of each image that could not be encoded."""
        self.failed_list = out / STATE_FOLDER / f"{format.set_name}.failed.txt"
        self.skipped: Counter[str] = Counter()
        """Files and folders that the trainer does not load, by type."""
        self.already_stored = 0
        """Images whose latents were stored before."""

    def encode(self, console: Console) -> int:
        """Encode the images, and return how many were encoded.

        Raises:
            ValueError: there is no image, or the output folder has latents that were made with other options.
            RemoteVAEError: the endpoint cannot be reached, or refuses all images.
        """
        for module, _ in PLUGINS.values():
            with suppress(ImportError):
                import_module(module)
        files = self.find()
        if not files and not self.failed:
            suffixes = ", ".join(sorted(self.format.suffixes))
            message = f"{self.folder} has no image that {self.format.trainer} loads: expected files with {suffixes}"
            raise ValueError("; ".join(filter(None, [message, self.skipped_summary()])))
        self._check_settings()
        pool = ThreadPoolExecutor(self.workers)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            try:
                reading = progress.add_task("reading", total=len(files), speed="")
                groups = self._groups(progress.track(files, task_id=reading))
                total = sum(map(len, groups))
                encoding = progress.add_task("encoding", total=total, speed="")
                for _ in self._encode(pool, groups):
                    speed = progress.tasks[encoding].speed
                    progress.update(encoding, advance=1, speed=f"{speed:.1f} images/s" if speed else "")
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # images in flight are not waited for
                self._list_failed()
        return total - len({image.relative for group in groups for image in group} & self.failed.keys())

    def skipped_summary(self) -> str:
        """Return a sentence about the files that the trainer does not load; empty if there are none."""
        types = ", ".join(f"{count} {name}" for name, count in sorted(self.skipped.items()))
        return f"skipped, because {self.format.trainer} does not load them: {types}" if types else ""

    def find(self) -> list[Path]:
        """Return the images below the folder, relative to it."""
        images = []
        media = MEDIA | Image.registered_extensions().keys()
        for path in self._walk(self.folder):
            relative, is_hidden = path.relative_to(self.folder), path.name.startswith(".")
            if not is_hidden and self.format.loads(relative):
                images.append(relative)
            elif path.suffix.lower() in media:
                self.skipped[f"hidden {path.suffix}" if is_hidden else path.suffix] += 1
        return sorted(images)

    def _walk(self, folder: Path, parents: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
        """Yield the files below a folder. A link to one of its parents is not followed."""
        try:
            status, entries = folder.stat(), list(folder.iterdir())
        except OSError as error:
            self.failed[folder.relative_to(self.folder)] = _reason(error)
            return
        identity = (status.st_dev, status.st_ino)
        if identity in parents:
            return
        for path in entries:
            if not os.path.isdir(path):
                yield path
            elif path.is_symlink() and not self.format.follows_links:
                self.skipped["linked folder"] += 1
            elif not path.name.startswith("."):
                yield from self._walk(path, parents | {identity})

    def _check_settings(self) -> None:
        """Compare the settings with those of earlier runs into this folder, and save them.

        Raises:
            ValueError: the settings differ, so the files could be mistaken for those of an earlier run.
        """
        file = self.out / STATE_FOLDER / f"{self.format.set_name}.json"
        settings = {"format": type(self.format).__name__, "seed": self.seed, **asdict(self.format)}
        settings["resolution"] = list(self.format.resolution)  # as JSON has it
        del settings["arch"]  # it is in the file's name
        if self.format.mixes_resolutions:
            del settings["resolution"]
        earlier = _read_settings(file) if file.exists() else settings
        changed = [f"{name}={earlier.get(name)}" for name in settings if earlier.get(name) != settings[name]]
        if changed:
            options = ", ".join(changed)
            raise ValueError(f"{self.out} has latents that were made with {options}; use the same, or another --out")
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(settings).encode())

    def _groups(self, files: Iterable[Path]) -> list[list[ImageFile]]:
        """Return the images that are not stored yet, in groups that are written together."""
        stored = self.format.stored(self.out)
        owners = dict(stored)
        images: list[ImageFile] = []
        for image in filter(None, map(self._read_header, files)):
            try:
                name = self.format.name(image)
                owner = owners.setdefault(name, image.relative)
                if owner != image.relative:
                    raise ValueError(f"its latents would have the same name as those of {owner}; rename the image")
                if name in stored or self.format.is_stored(self.out, image):
                    self.already_stored += 1
                else:
                    images.append(image)
            except (OSError, ValueError) as error:
                self.failed[image.relative] = _reason(error)
        size = self.format.images_per_file
        groups = [images[start : start + size] for start in range(0, len(images), size)]
        return sorted(groups, key=lambda group: group[0].placement.bucket)  # the endpoint batches images of one size

    def _read_header(self, relative: Path) -> ImageFile | None:
        """Read the size of an image. Return None, and list the image as failed, if it has none."""
        path = self.folder / relative
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # to open a FIFO would block
                raise ValueError("it is not a file, but a FIFO, a socket or a device")
            with Image.open(path) as image:
                is_rotated = self.format.applies_exif and image.getexif().get(Base.Orientation, 1) >= 5
                size = image.size[::-1] if is_rotated else image.size
            return ImageFile(path, relative, self.format.place(size))
        except Exception as error:  # Pillow raises a dozen types for damaged files
            self.failed[relative] = _reason(error)
            if isinstance(error, UnidentifiedImageError) and (plugin := PLUGINS.get(path.suffix.lower())):
                self.failed[relative] += f"; if Pillow does not read {path.suffix} here, `pip install {plugin[1]}`"
            return None

    def _encode(self, pool: ThreadPoolExecutor, groups: list[list[ImageFile]]) -> Iterator[None]:
        """Keep all workers busy and few images in memory. Yield once for each image that is done."""
        jobs = ((index, image) for index, group in enumerate(groups) for image in group)
        results: dict[int, list[Encoded | None]] = {}
        running: dict[Future[Encoded | None], int] = {}
        while True:
            for index, image in islice(jobs, 2 * self.workers - len(running)):
                running[pool.submit(self._encode_image, image)] = index
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                index = running.pop(future)
                results.setdefault(index, []).append(future.result())
                if len(results[index]) == len(groups[index]):
                    self._write(groups[index], [encoded for encoded in results.pop(index) if encoded])
                yield

    def _encode_image(self, image: ImageFile) -> Encoded | None:
        """Encode an image. Return None, and list the image as failed, if that is impossible."""
        try:
            with Image.open(image.path) as opened:
                upright = ImageOps.exif_transpose(opened) if self.format.applies_exif else opened
                pixels = self.format.pixels(upright, image.placement)
            batch = torch.from_numpy(np.stack([np.array(each) for each in pixels]))
            caption = self.format.caption(image)
        except Exception as error:
            self.failed[image.relative] = _reason(error)
            return None
        if self.is_video:  # an image is a video of one frame
            batch = batch.movedim(-1, 1).unsqueeze(2).contiguous()
        parameters: dict[str, Any] = {
            "sample_mode": self.format.sample_mode,
            "do_scaling": self.format.normalized,
            "latents_layout": self.format.architecture.layout,
        }
        if self.format.sample_mode == "sample":
            name = image.relative.as_posix().encode(errors="surrogateescape")
            parameters["seed"] = self.seed ^ zlib.crc32(name)
        try:
            latents = tensors.encode(self.client, batch, **parameters)
        except RemoteVAEError as error:
            if error.status not in IMAGE_ERRORS:
                raise
            self.failed[image.relative] = _reason(error)
            return None
        if latents.ndim == 5 and not self.format.architecture.has_frames:
            latents = latents.squeeze(2)
        return Encoded(image, latents[0], latents[1] if self.format.flip else None, caption)

    def _write(self, group: list[ImageFile], encoded: list[Encoded]) -> None:
        """Write the files of a group, in its order. An image is missing in `encoded` if it failed."""
        if not encoded:
            return
        order = {image.relative: index for index, image in enumerate(group)}
        encoded.sort(key=lambda each: order[each.image.relative])
        paths = [self.out / file for file in self.format.files(group)]
        try:
            for path, data in zip(paths, self.format.contents(encoded, paths), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, data)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            self.failed |= {image.relative: _reason(error) for image in group}

    def _list_failed(self) -> None:
        """Write a line for each failed image: the bytes of its name, line breaks escaped, and the reason."""
        if not self.failed:
            self.failed_list.unlink(missing_ok=True)
            return
        lines = [
            str(name).translate({ord("\n"): r"\n", ord("\t"): r"\t"}).encode(errors="surrogateescape")
            + b"\t"
            + reason.encode(errors="backslashreplace")
            + b"\n"
            for name, reason in sorted(self.failed.items())
        ]
        write(self.failed_list, b"".join(lines))


def _read_settings(file: Path) -> dict[str, Any]:
    """Return the settings of the run that wrote this file."""
    try:
        settings = json.loads(file.read_bytes())
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is damaged; delete it if the latents beside it were made with the same options")
    return settings


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
