"""Encodes a folder of pictures, many at a time. A file is written whole or not at all, so that a run can go on."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.ExifTags import Base
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from remote_vae import tensors
from remote_vae.client import Client, RemoteVAEError
from remote_vae.files import write
from remote_vae.latents.formats import Encoded, Format, Picture

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
STATE, FAILED = "remote-vae.json", "failed.txt"
OF_THE_PICTURE = (400, 413, 422)
"""Statuses that say something of one picture; all others end the run."""


@dataclass(frozen=True)
class Part:
    """Pictures that are written together, into these files of the output's folder."""

    pictures: list[Picture]
    files: list[Path]


class Run:
    """A run over a folder, or what is left of it."""

    def __init__(
        self, client: Client, about: dict[str, Any], folder: Path, out: Path, made: Format, seed: int, workers: int
    ) -> None:
        """`about` is the endpoint's config."""
        self.client, self.folder, self.out, self.made = client, folder, out, made
        self.seed, self.workers = seed, workers
        self.video = about["kind"] == "video"
        self.failed: dict[Path, str] = {}
        self.there = 0
        """Pictures whose files were there already."""

    def go(self, console: Console) -> int:
        """Gives how many pictures were encoded.

        Raises:
            ValueError: the output's folder holds latents that were made otherwise.
            RemoteVAEError: the endpoint is lost, or refuses all of them.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        groups = self._groups()
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
                looking = progress.add_task("looking", total=len(groups), speed="")
                parts = list(self._parts(progress.track(groups, task_id=looking)))
                parts.sort(key=lambda part: part.pictures[0].placement.bucket)  # of one size may be one batch there
                left = sum(len(part.pictures) for part in parts)
                encoding = progress.add_task("encoding", total=left, speed="")
                for _ in self._encode(pool, parts):
                    speed = progress.tasks[encoding].speed
                    progress.update(encoding, advance=1, speed=f"{speed:.1f} pictures/s" if speed else "")
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # nobody waits for those that are on their way
                self._list_failed()
        return left - len({picture.relative for part in parts for picture in part.pictures} & self.failed.keys())

    def _groups(self) -> list[list[Path]]:
        """The pictures that are written together, relative to the folder; those of earlier runs as they were then.

        Raises:
            ValueError: the output's folder holds latents that were made otherwise.
        """
        paths = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        found = {path for path in paths if not any(part.startswith(".") for part in path.parts)}
        made = {"format": type(self.made).__name__, "seed": self.seed, **asdict(self.made)}
        made["resolution"] = list(self.made.resolution)
        state = self.out / STATE
        before = json.loads(state.read_text()) if state.is_file() else {"made": made}
        if before["made"] != made:
            other = ", ".join(f"{name}={value}" for name, value in before["made"].items() if made.get(name) != value)
            raise ValueError(f"{self.out} holds latents that were made with {other}; take another folder")
        groups = [[Path(name) for name in group] for group in before.get("groups", [])]
        new = sorted(found.difference(*groups))
        groups += [new[start : start + self.made.together] for start in range(0, len(new), self.made.together)]
        if self.made.together > 1:
            before["groups"] = [[path.as_posix() for path in group] for group in groups]
        write(state, json.dumps(before).encode())
        return groups

    def _parts(self, groups: Iterable[list[Path]]) -> Iterator[Part]:
        """What is not there yet."""
        taken: dict[Path, Path] = {}
        for index, group in enumerate(groups):
            pictures = []
            for picture in filter(None, map(self._look, group)):
                first = taken.setdefault(self.made.name(picture), picture.relative)
                if first == picture.relative:
                    pictures.append(picture)
                else:
                    self.failed[picture.relative] = f"its latents would have the name of those of {first}"
            files = self.made.files(index, pictures) if pictures else []
            if all((self.out / file).exists() for file in files):
                self.there += len(pictures)
            else:
                yield Part(pictures, files)

    def _look(self, relative: Path) -> Picture | None:
        """Reads the picture's size alone."""
        path = self.folder / relative
        try:
            with Image.open(path) as image:
                turned = self.made.turns and image.getexif().get(Base.Orientation, 1) >= 5
                size = image.size[::-1] if turned else image.size
            return Picture(path, relative, self.made.place(size))
        except Exception as error:  # Pillow raises a dozen types for broken files
            self.failed[relative] = _reason(error)
            return None

    def _encode(self, pool: ThreadPoolExecutor, parts: list[Part]) -> Iterator[None]:
        """Keeps all workers busy, and few pictures in memory. Gives one for each that is done."""
        jobs = ((index, picture) for index, part in enumerate(parts) for picture in part.pictures)
        results: dict[int, list[Encoded | None]] = {}
        running: dict[Future[Encoded | None], int] = {}
        while True:
            for index, picture in islice(jobs, 2 * self.workers - len(running)):
                running[pool.submit(self._one, picture)] = index
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                index = running.pop(future)
                part = parts[index]
                results.setdefault(index, []).append(future.result())
                if len(results[index]) == len(part.pictures):
                    self._write(part, [each for each in results.pop(index) if each])
                yield

    def _one(self, picture: Picture) -> Encoded | None:
        """None where this picture cannot be encoded."""
        try:
            with Image.open(picture.path) as image:
                upright = ImageOps.exif_transpose(image) if self.made.turns else image
                fitted = self.made.resize(upright.convert("RGB"), picture.placement)
            pixels = torch.from_numpy(np.array(fitted))[None]
        except Exception as error:
            self.failed[picture.relative] = _reason(error)
            return None
        batch = torch.cat([pixels, pixels.flip(2)]) if self.made.flip else pixels
        if self.video:  # of one frame
            batch = batch.movedim(-1, 1).unsqueeze(2).contiguous()
        parameters: dict[str, Any] = {"sample_mode": self.made.sample_mode, "do_scaling": self.made.scaled}
        if self.made.sample_mode == "sample":
            parameters["seed"] = self.seed ^ zlib.crc32(picture.relative.as_posix().encode())
        try:
            latents = tensors.encode(self.client, batch, **parameters)
        except RemoteVAEError as error:
            if error.status not in OF_THE_PICTURE:
                raise
            self.failed[picture.relative] = _reason(error)
            return None
        return Encoded(picture, latents[0], latents[1] if self.made.flip else None)

    def _write(self, part: Part, encoded: list[Encoded]) -> None:
        if not encoded:
            return
        order = {picture.relative: index for index, picture in enumerate(part.pictures)}
        encoded.sort(key=lambda each: order[each.picture.relative])
        for file, data in zip(part.files, self.made.contents(encoded), strict=True):
            (self.out / file).parent.mkdir(parents=True, exist_ok=True)
            write(self.out / file, data)

    def _list_failed(self) -> None:
        text = "".join(f"{name}\t{reason}\n" for name, reason in sorted(self.failed.items()))
        write(self.out / FAILED, text.encode()) if text else (self.out / FAILED).unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
