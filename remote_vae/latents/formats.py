"""Formats of the trainers: which images they load, how they resize them, and the names and contents of their caches."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from PIL import Image, ImageOps
from safetensors.torch import save
from torch import Tensor

from remote_vae.latents.buckets import AIToolkitBuckets, KohyaBuckets, MusubiBuckets, Placement, Size


@dataclass(frozen=True)
class ImageFile:
    """One image of the data set."""

    path: Path
    relative: Path
    """The path below the data set's folder."""
    placement: Placement

    def sized_name(self, end: str) -> Path:
        """Return the relative path with the image's size and `end` in its name."""
        width, height = self.placement.original
        return self.relative.with_name(f"{self.relative.stem}_{width:04d}x{height:04d}_{end}")


@dataclass(frozen=True)
class Encoded:
    """An image's latents [C, h, w], or moments [2 * C, h, w]; [C, 1, h, w] of a video VAE."""

    image: ImageFile
    latents: Tensor
    flipped: Tensor | None = None
    caption: bytes | None = None


@dataclass
class Format(ABC):
    """The cache of a trainer. Each file holds one image, or up to `together` images."""

    model: str
    resolution: Size
    upscale: bool = True
    flip: bool = False
    sample_mode: str | None = None
    """Which values of the encoder's distribution are stored; None for those that the trainer itself stores."""

    models: ClassVar[dict[str, Any]]
    """What is known of each model, by the key of its endpoint; empty where every model works."""
    trainer: ClassVar[str]
    suffixes: ClassVar[frozenset[str]]
    """Ends of the names of the images that the trainer loads, in lower case."""
    any_case: ClassVar[bool] = True
    """Whether a name may also end in mixed case, such as `.Jpg`; else all lower or all upper."""
    follows_links: ClassVar[bool] = True
    """Whether the trainer looks into folders that are links."""
    sampled: ClassVar[str] = "sample"
    together: ClassVar[int] = 1
    turns: ClassVar[bool] = False
    """Whether images are turned as their EXIF says."""

    def __post_init__(self) -> None:
        if self.models and self.model not in self.models:
            raise ValueError(f"{type(self).__name__} is known for {', '.join(self.models)}, and this is {self.model}")
        if self.sample_mode not in (None, self.sampled) and self.models:
            raise ValueError(f"{type(self).__name__} stores {self.sampled}; --sample-mode is of webdataset alone")
        self.sample_mode = self.sample_mode or self.sampled
        self.scaled = True
        """Whether latents are stored normalized, as the diffusion model takes them."""
        self.several_resolutions = False
        """Whether caches of several resolutions may lie in one folder."""
        self.buckets: KohyaBuckets | MusubiBuckets | AIToolkitBuckets

    @property
    def set_name(self) -> str:
        """A name for all files that could be mistaken for one another, which must come from one set of options."""
        return f"{self.trainer}-{self.model}"

    def loads(self, relative: Path) -> bool:
        """Return whether the trainer loads a file of this name."""
        suffix = relative.suffix
        return suffix.lower() in self.suffixes and (self.any_case or suffix in (suffix.lower(), suffix.upper()))

    def place(self, size: Size) -> Placement:
        return self.buckets.place(size)

    def pixels(self, image: Image.Image, placement: Placement) -> list[Image.Image]:
        """Return the image in RGB as the trainer encodes it, and with `flip` its mirror image."""
        fitted = self.fit(self.convert(image), placement)
        return [fitted, ImageOps.mirror(fitted)] if self.flip else [fitted]

    def convert(self, image: Image.Image) -> Image.Image:
        """Return the image in the mode in which it is resized."""
        return image.convert("RGB")

    def fit(self, image: Image.Image, placement: Placement) -> Image.Image:
        """Resize and crop as kohya's trainers do: with OpenCV's area where it shrinks, else with Pillow's Lanczos."""
        if image.size != placement.resized:
            if image.width >= placement.resized[0] and image.height >= placement.resized[1]:
                pixels = cv2.resize(np.array(image), placement.resized, interpolation=cv2.INTER_AREA)
                image = Image.fromarray(pixels)
            else:
                image = image.resize(placement.resized, Image.Resampling.LANCZOS)
        return _cropped(image, placement)

    def caption(self, image: ImageFile) -> bytes | None:
        """Return the caption, where it is stored beside the latents."""
        return None

    def stored(self, out: Path) -> dict[Path, Path]:
        """Return the relative paths of the images in files of several, by `name`."""
        return {}

    def is_stored(self, out: Path, image: ImageFile) -> bool:
        """Return whether the image has files of its own in the folder `out` that hold its latents."""
        return all((out / file).exists() for file in self.files([image]))

    def name(self, image: ImageFile) -> Path:
        """Return a name that is the image's own; no other image's latents may have it."""
        return self.files([image])[0]

    @abstractmethod
    def files(self, images: list[ImageFile]) -> list[Path]:
        """Return the files for images that are written together, relative to the output folder."""

    @abstractmethod
    def contents(self, encoded: list[Encoded], paths: list[Path]) -> list[bytes]:
        """Return the new contents of each of `paths`, which are `files` in the output folder."""


@dataclass
class Kohya(Format):
    """sd-scripts' `.npz` beside each image, as `--cache_latents_to_disk` writes it."""

    models: ClassVar[dict[str, tuple[str, bool, bool]]] = {
        "sd-v1": ("sd", False, False),
        "sdxl": ("sdxl", False, False),
        "sd3": ("sd3", True, False),
        "flux": ("flux", True, True),
    }
    """Suffix; whether keys end in the latents' size; whether latents are normalized."""
    trainer: ClassVar[str] = "sd-scripts"
    suffixes: ClassVar[frozenset[str]] = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"})
    any_case: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.buckets = KohyaBuckets(self.resolution, self.upscale, most=max(1024, *self.resolution))
        self.suffix, self.several_resolutions, self.scaled = self.models[self.model]

    def files(self, images: list[ImageFile]) -> list[Path]:
        return [images[0].sized_name(f"{self.suffix}.npz")]

    def is_stored(self, out: Path, image: ImageFile) -> bool:
        exists = super().is_stored(out, image)
        if not exists or not self.several_resolutions:
            return exists
        width, height = image.placement.bucket
        end = f"_{height // 8}x{width // 8}"
        with _npz(out / self.name(image)) as file:
            return f"latents{end}" in file and (not self.flip or f"latents_flipped{end}" in file)

    def contents(self, encoded: list[Encoded], paths: list[Path]) -> list[bytes]:
        """Return the file with the arrays of other resolutions that it holds already."""
        (one,), (path,) = encoded, paths
        height, width = one.latents.shape[-2:]
        end = f"_{height}x{width}" if self.several_resolutions else ""
        arrays: dict[str, Any] = {}
        if self.several_resolutions and path.exists():
            with _npz(path) as file:
                arrays.update(file)
        arrays |= {
            f"latents{end}": one.latents.float().numpy(),
            f"original_size{end}": np.array(one.image.placement.original),
            f"crop_ltrb{end}": np.array(crop_ltrb(one.image.placement)),
        }
        if one.flipped is not None:
            arrays[f"latents_flipped{end}"] = one.flipped.float().numpy()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return [buffer.getvalue()]


@contextmanager
def _npz(path: Path) -> Iterator[Any]:
    try:
        with np.load(path) as file:
            yield file
    except Exception as error:  # numpy and zipfile raise half a dozen types for broken files
        raise ValueError(f"{path} cannot be read as an .npz file ({error}); delete or move it") from None


def crop_ltrb(placement: Placement) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the bucket in the image, as SDXL is conditioned on them."""
    (width, height), ratio = placement.bucket, placement.original[0] / placement.original[1]
    resized = (height * ratio, height) if width / height > ratio else (width, width / ratio)
    left, top = (width - resized[0]) // 2, (height - resized[1]) // 2
    return left, top, left + resized[0], top + resized[1]


def _cropped(image: Image.Image, placement: Placement) -> Image.Image:
    left, top = placement.corner
    return image.crop((left, top, left + placement.bucket[0], top + placement.bucket[1])).convert("RGB")


@dataclass
class Musubi(Format):
    """musubi-tuner's latent cache, for its `cache_directory`."""

    models: ClassVar[dict[str, tuple[str, str]]] = {
        "qwen-image": ("qi", "qwen_image"),
        "wan-2.1": ("wan", "wan"),
    }
    """Its short and long names of the architecture."""
    trainer: ClassVar[str] = "musubi-tuner"
    suffixes: ClassVar[frozenset[str]] = Kohya.suffixes
    any_case: ClassVar[bool] = False
    sampled: ClassVar[str] = "argmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flip:
            raise ValueError("musubi-tuner reads no flipped latents")
        self.buckets = MusubiBuckets(self.resolution, self.upscale)
        self.short, self.long = self.models[self.model]

    def convert(self, image: Image.Image) -> Image.Image:
        """Keep transparency: musubi-tuner resizes with it and then drops it. Lanczos gives other colors then."""
        return image if image.mode == "RGBA" else image.convert("RGB")

    def files(self, images: list[ImageFile]) -> list[Path]:
        return [images[0].sized_name(f"{self.short}.safetensors")]

    def contents(self, encoded: list[Encoded], paths: list[Path]) -> list[bytes]:
        (one,) = encoded
        dtype = str(one.latents.dtype).removeprefix("torch.")
        sizes = "x".join(map(str, one.latents.shape[1:]))
        width, height = map(str, one.image.placement.original)
        metadata = {"architecture": self.long, "width": width, "height": height, "format_version": "1.0.1"}
        return [save({f"latents_{sizes}_{dtype}": one.latents.contiguous()}, metadata)]


@dataclass
class AIToolkit(Format):
    """ai-toolkit's `_latent_cache` beside each image, as `cache_latents_to_disk` writes it."""

    models: ClassVar[dict[str, tuple[str, int]]] = {
        "sd-v1": ("sd1", 16),
        "sdxl": ("sdxl", 16),
        "sd3": ("sd3", 32),
        "flux": ("flux1", 32),
    }
    """Its name of the latents' space, and what sides of buckets are multiples of."""
    trainer: ClassVar[str] = "ai-toolkit"
    suffixes: ClassVar[frozenset[str]] = frozenset({".png", ".jpg", ".jpeg", ".webp"})
    follows_links: ClassVar[bool] = False
    turns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution[0] != self.resolution[1]:
            width, height = self.resolution
            raise ValueError(
                f"--resolution {width}x{height}: ai-toolkit's resolution is one side; "
                f"{int((width * height) ** 0.5)} has about this area"
            )
        self.space, steps = self.models[self.model]
        self.several_resolutions = True
        self.buckets = AIToolkitBuckets(self.resolution, steps)

    def loads(self, relative: Path) -> bool:
        return super().loads(relative) and relative.parent.name != "_controls"

    def pixels(self, image: Image.Image, placement: Placement) -> list[Image.Image]:
        """Mirror before the crop, as ai-toolkit does: where an odd number of pixels is cut off, it matters."""
        image = self.convert(image)
        return [self.fit(each, placement) for each in ([image, ImageOps.mirror(image)] if self.flip else [image])]

    def fit(self, image: Image.Image, placement: Placement) -> Image.Image:
        return _cropped(image.resize(placement.resized, Image.Resampling.BICUBIC), placement)

    def files(self, images: list[ImageFile]) -> list[Path]:
        return [self._file(images[0], flip) for flip in ([False, True] if self.flip else [False])]

    def _about(self, image: ImageFile, flip: bool) -> dict[str, Any]:
        """Return what the trainer tells its caches apart by, in its order."""
        placement = image.placement
        about = {
            "filename": image.path.name,
            "scale_to_width": placement.resized[0],
            "scale_to_height": placement.resized[1],
            "crop_x": placement.corner[0],
            "crop_y": placement.corner[1],
            "crop_width": placement.bucket[0],
            "crop_height": placement.bucket[1],
            "latent_space_version": self.space,
            "latent_version": 1,
        }
        return {**about, "flip_x": True} if flip else about

    def _file(self, image: ImageFile, flip: bool) -> Path:
        about = json.dumps(self._about(image, flip), sort_keys=True).encode()
        name = base64.urlsafe_b64encode(hashlib.md5(about).digest()).decode().replace("=", "")
        return image.relative.parent / "_latent_cache" / f"{image.relative.stem}_{name}.safetensors"

    def contents(self, encoded: list[Encoded], paths: list[Path]) -> list[bytes]:
        (one,) = encoded
        written = []
        for flip, latents in enumerate((one.latents, one.flipped)):
            if latents is not None:
                about = self._about(one.image, bool(flip)).items()
                metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about}
                metadata["filename"] = metadata["filename"].encode(errors="backslashreplace").decode()  # not UTF-8
                written.append(save({"latent": latents.contiguous()}, {**metadata, "format": "pt"}))
        return written


@dataclass
class WebDataset(Format):
    """Shards of a thousand images: `latents.npy` or `moments.npy`, `json`, and the caption beside it as `txt`."""

    models: ClassVar[dict[str, Any]] = {}  # all
    trainer: ClassVar[str] = "webdataset"
    suffixes: ClassVar[frozenset[str]] = Kohya.suffixes | {".jfif", ".jpe", ".gif", ".tif", ".tiff"}
    sampled: ClassVar[str] = "moments"
    together: ClassVar[int] = 1000
    turns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.buckets = KohyaBuckets(self.resolution, self.upscale, most=max(1024, *self.resolution))
        self.scaled = self.sample_mode != "moments"
        self._shards: Iterator[Path] = map(_shard, count())

    @property
    def set_name(self) -> str:
        return self.trainer  # shards of all models have the same names

    def convert(self, image: Image.Image) -> Image.Image:
        """Return the image as the endpoint itself reads it: 16 bits scaled to 8, transparency flattened on white."""
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

    def stored(self, out: Path) -> dict[Path, Path]:
        stored: dict[Path, Path] = {}
        for shard in sorted(out.glob("shard-*.tar")):
            try:
                with tarfile.open(shard, "r:") as archive:
                    for member in archive:
                        if member.name.endswith(".json") and (file := archive.extractfile(member)):
                            with suppress(ValueError, KeyError, TypeError):  # another program's
                                stored[Path(member.name.removesuffix(".json"))] = Path(json.load(file)["file"])
            except tarfile.TarError as error:
                raise ValueError(f"{shard} cannot be read as a shard ({error}); delete or move it") from None
        self._shards = (shard for shard in map(_shard, count()) if not (out / shard).exists())
        return stored

    def is_stored(self, out: Path, image: ImageFile) -> bool:
        return False

    def name(self, image: ImageFile) -> Path:
        """Return the sample's key. What follows a dot in a member's name is the member's kind, so it holds no dot."""
        return Path(image.relative.with_suffix("").as_posix().replace(".", "_"))

    def files(self, images: list[ImageFile]) -> list[Path]:
        """Return the first free name of a shard."""
        return [next(self._shards)]

    def caption(self, image: ImageFile) -> bytes | None:
        caption = image.path.with_suffix(".txt")
        return caption.read_bytes() if caption.is_file() else None

    def contents(self, encoded: list[Encoded], paths: list[Path]) -> list[bytes]:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:  # names of any length
            for each in encoded:
                for name, data in self._members(each).items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        return [buffer.getvalue()]

    def _members(self, encoded: Encoded) -> dict[str, bytes]:
        image, kind = encoded.image, "moments" if self.sample_mode == "moments" else "latents"
        key = self.name(image).as_posix()
        about = {
            "file": image.relative.as_posix(),
            "model": self.model,
            "normalized": self.scaled,
            "sample_mode": self.sample_mode,
            "original_size": image.placement.original,
            "bucket": image.placement.bucket,
            "crop_ltrb": crop_ltrb(image.placement),
        }
        members = {f"{key}.{kind}.npy": _npy(encoded.latents), f"{key}.json": json.dumps(about).encode()}
        if encoded.flipped is not None:
            members[f"{key}.{kind}_flipped.npy"] = _npy(encoded.flipped)
        return members if encoded.caption is None else {**members, f"{key}.txt": encoded.caption}


def _shard(number: int) -> Path:
    return Path(f"shard-{number:06d}.tar")


def _npy(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.float().numpy())
    return buffer.getvalue()


FORMATS: dict[str, type[Format]] = {
    "kohya": Kohya,
    "musubi": Musubi,
    "ai-toolkit": AIToolkit,
    "webdataset": WebDataset,
}
