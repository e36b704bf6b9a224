"""Shards of a thousand images: `latents.npy` or `moments.npy`, `json`, and the image's caption as `txt`."""

from __future__ import annotations

import fnmatch
import io
import json
import re
import tarfile
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from PIL import Image

from remote_vae.files import npy_bytes
from remote_vae.latents.buckets import KohyaBuckets, Size
from remote_vae.latents.format import Architecture, Encoded, Format, ImageFile, crop_ltrb
from remote_vae.latents.kohya import Kohya
from remote_vae.latents.storage import Folder
from remote_vae.latents.videos import SUFFIXES, Sampling, missing_clips, read_size


@dataclass
class WebDataset(Format):
    architectures: ClassVar[dict[str, Architecture]] = {}  # all are stored alike
    trainer: ClassVar[str] = "webdataset"
    suffixes: ClassVar[frozenset[str]] = Kohya.suffixes | {".jfif", ".jpe", ".gif", ".tif", ".tiff"}
    applies_exif: ClassVar[bool] = True
    images_per_file: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.buckets = KohyaBuckets(self.resolution, self.upscale, largest=max(1024, *self.resolution))
        self.normalized = self.sample_mode != "moments"
        self._free_names: Iterator[Path] = _shard_names("shard")
        self._stored = StoredKeys()

    def find_architecture(self) -> Architecture:
        if self.arch:
            raise ValueError(f"--arch {self.arch}: a webdataset stores all models alike; remove the option")
        return Architecture(self.model, "", sample_mode="moments", has_frames=True)

    @property
    def set_name(self) -> str:
        """Name for shards of all models: their names are the same."""
        return self.trainer

    def convert(self, image: Image.Image) -> Image.Image:
        """Convert the image as the endpoint does: scale 16 bits to 8, and flatten transparency on white."""
        if image.mode == "F":
            raise ValueError("the image's pixels are floats, whose range is unknown; save it with 8 or 16 bits")
        if image.mode.startswith("I"):
            values = np.asarray(image, np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError("the image's pixels have more than 16 bits; save it with 8 or 16 bits")
            pixels = ((values + 128) // 257).astype(np.uint8)
            pixels[values == image.info.get("transparency")] = 255
            image = Image.fromarray(pixels)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

    def prepare(self, out: Folder, run: str) -> None:
        """Read the keys of all shards in the folder."""
        self._stored = StoredKeys()
        for shard in sorted(fnmatch.filter(out.list(), "shard-*.tar")):
            try:
                with out.open(Path(shard)) as stored, tarfile.open(fileobj=stored, mode="r:") as archive:
                    for member in archive:
                        if member.name.endswith(".json") and (file := archive.extractfile(member)):
                            with suppress(ValueError, KeyError, TypeError):  # the shard of another program
                                self._stored.add(member.name.removesuffix(".json"), json.load(file)["file"])
            except tarfile.TarError as error:
                message = f"{out.location}/{shard} cannot be read as a shard ({error}); delete or move it"
                raise ValueError(message) from None
        prefix = "shard" + run.removeprefix(self.set_name).replace(".", "-")
        self._free_names = (name for name in _shard_names(prefix) if not out.is_file(name))

    def is_stored(self, out: Folder, image: ImageFile) -> bool:
        return self._stored.has(self.name(image).as_posix(), image.relative.as_posix())

    def name(self, image: ImageFile) -> Path:
        """Return the sample's key. It has no dot: the part of a member's name after the first dot is its type.

        Raises:
            ValueError: webdataset skips samples of this name.
        """
        key = image.relative.with_suffix("").as_posix().replace(".", "_")
        if re.match("__[^/]*__/", key):
            raise ValueError("webdataset skips what is in a folder such as __name__; rename the folder")
        return Path(key)

    def files(self, images: list[ImageFile]) -> list[Path]:
        """Return the first free name of a shard."""
        return [next(self._free_names)]

    def caption(self, image: ImageFile) -> bytes | None:
        caption = image.relative.with_suffix(".txt")
        return image.files.read(caption) if image.files.is_file(caption) else None

    def contents(self, encoded: list[Encoded], out: Folder) -> list[bytes]:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:  # takes names of any length
            for item in encoded:
                for name, data in self._members(item).items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        return [buffer.getvalue()]

    def _members(self, encoded: Encoded) -> dict[str, bytes]:
        image, kind = encoded.image, "moments" if self.sample_mode == "moments" else "latents"
        key = self.name(image).as_posix()
        metadata: dict[str, Any] = {
            "file": image.relative.as_posix(),
            "model": self.model,
            "normalized": self.normalized,
            "sample_mode": self.sample_mode,
            "original_size": image.placement.original,
            "bucket": image.placement.bucket,
            "crop_ltrb": crop_ltrb(image.placement),
        }
        if image.clip:
            metadata["clip"] = image.clip
        members = {
            f"{key}.{kind}.npy": npy_bytes(encoded.latents.float()),
            f"{key}.json": json.dumps(metadata).encode(),
        }
        if encoded.flipped is not None:
            members[f"{key}.{kind}_flipped.npy"] = npy_bytes(encoded.flipped.float())
        return members if encoded.caption is None else {**members, f"{key}.txt": encoded.caption}


@dataclass
class WebDatasetVideos(WebDataset):
    """Clips of videos: each is a sample, with its first frame and its number of frames as `clip` in the metadata."""

    sampling: Sampling = field(default_factory=lambda: Sampling((1,)))

    suffixes: ClassVar[frozenset[str]] = SUFFIXES
    images_per_file: ClassVar[int] = 20
    """Videos whose clips are in one shard."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flip:
            raise ValueError("--flip: mirrored videos are not supported; remove the option")
        if self.sampling.source_fps:
            raise ValueError("--source-fps: shards keep every frame of a video; remove the option")

    @property
    def set_name(self) -> str:
        return f"{super().set_name}-videos"

    def read_size(self, file: BinaryIO) -> Size:
        return read_size(file)

    def is_stored(self, out: Folder, image: ImageFile) -> bool:
        """Return False for a video: only `parts` knows its clips, because it counts the frames."""
        return bool(image.clip) and super().is_stored(out, image)

    def name(self, image: ImageFile) -> Path:
        name = super().name(image)
        return name.with_name(f"{name.name}_{image.clip[0]:05d}-{image.clip[1]:03d}") if image.clip else name

    def parts(self, image: ImageFile, out: Folder) -> Iterator[tuple[ImageFile, np.ndarray[Any, Any]]]:
        yield from missing_clips(image, self.sampling, 0, partial(self.is_stored, out), self.fit)


def _shard_names(prefix: str) -> Iterator[Path]:
    return (Path(f"{prefix}-{index:06d}.tar") for index in count())


class StoredKeys:
    """Keys of samples and the files that they were made from, as hashes: 16 bytes for each sample."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._table = np.empty((0, 2), np.uint64)

    def add(self, key: str, file: str) -> None:
        self._hashes.extend((_hash(key), _hash(file)))

    def has(self, key: str, file: str) -> bool:
        """Return True if this key was made from this file.

        Raises:
            ValueError: it was made from another file.
        """
        if len(self._table) * 2 != len(self._hashes):
            table = np.frombuffer(self._hashes, np.uint64).reshape(-1, 2)
            self._table = table[table[:, 0].argsort(kind="stable")]
        index = int(np.searchsorted(self._table[:, 0], np.uint64(_hash(key))))
        if index == len(self._table) or self._table[index, 0] != _hash(key):
            return False
        if self._table[index, 1] != _hash(file):
            raise ValueError("its latents would have the same name as those of another image; rename the image")
        return True


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "little")
