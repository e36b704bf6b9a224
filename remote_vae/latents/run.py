"""Encode a folder of images, many at a time. A file is written whole or not at all, so that a run can go on."""

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
from remote_vae.latents.formats import Encoded, Format, ImageFile

OWN = ".remote-vae"
"""The folder of the command's own files, in the output folder. Trainers skip it, as its name begins with a dot."""
STATE_OF_0_1 = "remote-vae.json"
"""The file of version 0.1 for what lies in `OWN` now. It is read, never written."""
PLUGINS = {".avif": ("pillow_avif", "pillow-avif-plugin"), ".jxl": ("pillow_jxl", "pillow-jxl-plugin")}
"""The module that teaches Pillow to read a kind of file, and its package. The trainers use the same."""
MEDIA = {".avif", ".heic", ".heif", ".jxl", ".svg", ".avi", ".mkv", ".mov", ".mp4", ".webm"}
"""Suffixes beside those of Pillow. A run says how many files of these kinds it left out."""
OF_THE_IMAGE = (400, 413, 422)
"""Statuses that say something of one image; all others end the run."""


class Run:
    """A run over a folder, or over the rest of it that an earlier run left."""

    def __init__(
        self, client: Client, about: dict[str, Any], folder: Path, out: Path, made: Format, seed: int, workers: int
    ) -> None:
        """`about` is the endpoint's config."""
        self.client, self.folder, self.out, self.made = client, folder, out, made
        self.seed, self.workers = seed, workers
        self.video = about["kind"] == "video"
        self.failed: dict[Path, str] = {}
        self.failed_list = out / OWN / f"{made.set_name}.failed.txt"
        self.left_out: Counter[str] = Counter()
        """Files and folders that the trainer does not load, by their kind."""
        self.there = 0
        """Images whose latents were stored already."""

    def go(self, console: Console) -> int:
        """Return how many images were encoded.

        Raises:
            ValueError: there is no image, or the output folder holds latents that were made otherwise.
            RemoteVAEError: the endpoint is lost, or refuses all of them.
        """
        for module, _ in PLUGINS.values():
            with suppress(ImportError):
                import_module(module)
        found = self.find()
        if not found and not self.failed:
            raise ValueError(
                f"{self.folder} holds no image that {self.made.trainer} loads; expected files of the kinds "
                f"{', '.join(sorted(self.made.suffixes))}" + (f"; {said}" if (said := self.what_was_left_out()) else "")
            )
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
                looking = progress.add_task("looking", total=len(found), speed="")
                parts = self._parts(progress.track(found, task_id=looking))
                left = sum(map(len, parts))
                encoding = progress.add_task("encoding", total=left, speed="")
                for _ in self._encode(pool, parts):
                    speed = progress.tasks[encoding].speed
                    progress.update(encoding, advance=1, speed=f"{speed:.1f} images/s" if speed else "")
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # nobody waits for those that are in flight
                self._list_failed()
        return left - len({image.relative for part in parts for image in part} & self.failed.keys())

    def what_was_left_out(self) -> str:
        """Return a sentence about the files that the trainer does not load; empty if there is none."""
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(self.left_out.items()))
        return f"left out, as {self.made.trainer} does not load them: {kinds}" if kinds else ""

    def find(self) -> list[Path]:
        """Return the images below the folder, relative to it. A link to a folder above itself is not followed."""
        found: list[Path] = []
        media = MEDIA | Image.registered_extensions().keys()
        pending: list[tuple[Path, frozenset[tuple[int, int]]]] = [(self.folder, frozenset())]
        while pending:
            folder, above = pending.pop()
            try:
                about, entries = folder.stat(), list(folder.iterdir())
            except OSError as error:
                self.failed[folder.relative_to(self.folder)] = _reason(error)
                continue
            identity = (about.st_dev, about.st_ino)
            if identity in above:
                continue
            for path in entries:
                relative, hidden = path.relative_to(self.folder), path.name.startswith(".")
                if os.path.isdir(path):
                    if path.is_symlink() and not self.made.follows_links:
                        self.left_out["linked folder"] += 1
                    elif not hidden:
                        pending.append((path, above | {identity}))
                elif not hidden and self.made.loads(relative):
                    found.append(relative)
                elif path.suffix.lower() in media:
                    self.left_out[f"hidden {path.suffix}" if hidden else path.suffix] += 1
        return sorted(found)

    def _check_settings(self) -> None:
        """Compare the settings with those of earlier runs into this folder, and note them.

        Raises:
            ValueError: the files of this run and of earlier ones could be mistaken for one another, and they differ.
        """
        made = self.made
        settings = {"format": type(made).__name__, "seed": self.seed, **asdict(made), "resolution": [*made.resolution]}
        if made.several_resolutions:
            del settings["resolution"]
        state = self.out / OWN / f"{made.set_name}.json"
        earlier = _settings(state if state.exists() else self.out / STATE_OF_0_1)
        if state.exists() and not earlier:
            raise ValueError(f"{state} is damaged; delete it if the latents beside it were made with these settings")
        if earlier.get("format") != settings["format"] or (made.models and earlier.get("model") != made.model):
            earlier = settings  # there are none
        other = ", ".join(f"{name}={earlier.get(name)}" for name in settings if earlier.get(name) != settings[name])
        if other:
            raise ValueError(f"{self.out} holds latents that were made with {other}; give the same, or another --out")
        state.parent.mkdir(parents=True, exist_ok=True)
        write(state, json.dumps({"made": settings}).encode())

    def _parts(self, found: Iterable[Path]) -> list[list[ImageFile]]:
        """Return the images that are not stored yet, in parts that are written together."""
        stored = self.made.stored(self.out)
        taken = dict(stored)
        new: list[ImageFile] = []
        for image in filter(None, map(self._look, found)):
            try:
                name = self.made.name(image)
                first = taken.setdefault(name, image.relative)
                if first != image.relative:
                    raise ValueError(f"its latents would have the name of those of {first}; rename it")
                if name in stored or self.made.is_stored(self.out, image):
                    self.there += 1
                else:
                    new.append(image)
            except (OSError, ValueError) as error:
                self.failed[image.relative] = _reason(error)
        parts = [new[start : start + self.made.together] for start in range(0, len(new), self.made.together)]
        return sorted(parts, key=lambda part: part[0].placement.bucket)  # images of one size may be one batch there

    def _look(self, relative: Path) -> ImageFile | None:
        """Read the image's size alone."""
        path = self.folder / relative
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # to open a FIFO would wait forever
                raise ValueError("it is not a file, but a FIFO, a socket or a device")
            with Image.open(path) as image:
                turned = self.made.turns and image.getexif().get(Base.Orientation, 1) >= 5
                size = image.size[::-1] if turned else image.size
            return ImageFile(path, relative, self.made.place(size))
        except Exception as error:  # Pillow raises a dozen types for broken files
            self.failed[relative] = _reason(error)
            if isinstance(error, UnidentifiedImageError) and (plugin := PLUGINS.get(path.suffix.lower())):
                self.failed[relative] += f"; if Pillow reads no {path.suffix} here, `pip install {plugin[1]}`"
            return None

    def _encode(self, pool: ThreadPoolExecutor, parts: list[list[ImageFile]]) -> Iterator[None]:
        """Keep all workers busy, and few images in memory. Yield once for each image that is done."""
        jobs = ((index, image) for index, part in enumerate(parts) for image in part)
        results: dict[int, list[Encoded | None]] = {}
        running: dict[Future[Encoded | None], int] = {}
        while True:
            for index, image in islice(jobs, 2 * self.workers - len(running)):
                running[pool.submit(self._one, image)] = index
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                index = running.pop(future)
                part = parts[index]
                results.setdefault(index, []).append(future.result())
                if len(results[index]) == len(part):
                    self._write(part, [each for each in results.pop(index) if each])
                yield

    def _one(self, image: ImageFile) -> Encoded | None:
        """Encode an image; None if it cannot be."""
        try:
            with Image.open(image.path) as opened:
                upright = ImageOps.exif_transpose(opened) if self.made.turns else opened
                pixels = self.made.pixels(upright, image.placement)
            batch = torch.from_numpy(np.stack([np.array(each) for each in pixels]))
            caption = self.made.caption(image)
        except Exception as error:
            self.failed[image.relative] = _reason(error)
            return None
        if self.video:  # of one frame
            batch = batch.movedim(-1, 1).unsqueeze(2).contiguous()
        parameters: dict[str, Any] = {"sample_mode": self.made.sample_mode, "do_scaling": self.made.scaled}
        if self.made.sample_mode == "sample":
            name = image.relative.as_posix().encode(errors="surrogateescape")
            parameters["seed"] = self.seed ^ zlib.crc32(name)
        try:
            latents = tensors.encode(self.client, batch, **parameters)
        except RemoteVAEError as error:
            if error.status not in OF_THE_IMAGE:
                raise
            self.failed[image.relative] = _reason(error)
            return None
        return Encoded(image, latents[0], latents[1] if self.made.flip else None, caption)

    def _write(self, part: list[ImageFile], encoded: list[Encoded]) -> None:
        if not encoded:
            return
        order = {image.relative: index for index, image in enumerate(part)}
        encoded.sort(key=lambda each: order[each.image.relative])
        paths = [self.out / file for file in self.made.files(part)]
        try:
            for path, data in zip(paths, self.made.contents(encoded, paths), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, data)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            self.failed |= {image.relative: _reason(error) for image in part}

    def _list_failed(self) -> None:
        """Write a line for each image: its name and the reason. The names' bytes are kept, save for line ends."""
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


def _settings(state: Path) -> dict[str, Any]:
    """Return the settings that a run noted in this file; none if the file is missing, or is no run's."""
    try:
        made = json.loads(state.read_bytes())["made"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return made if isinstance(made, dict) else {}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
