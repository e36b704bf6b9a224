"""What each trainer reads: names of files, what is in them, and how pictures get their size."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from remote_vae.latents.buckets import AIToolkitBuckets, KohyaBuckets, MusubiBuckets, Placement, Size


@dataclass(frozen=True)
class Picture:
    """One of the data set."""

    path: Path
    relative: Path
    """In the data set's folder."""
    placement: Placement

    def sized_name(self, end: str) -> Path:
        """Beside it: its name and size before `end`."""
        width, height = self.placement.original
        return self.relative.with_name(f"{self.relative.stem}_{width:04d}x{height:04d}_{end}")


@dataclass(frozen=True)
class Encoded:
    """What became of a picture: latents [C, h, w], or moments [2 * C, h, w]; [C, 1, h, w] of some VAEs."""

    picture: Picture
    latents: Tensor
    flipped: Tensor | None = None


@dataclass
class Format(ABC):
    """A trainer's. Its files are written for pictures by themselves, or for `together` of them."""

    model: str
    resolution: Size
    upscale: bool = True
    flip: bool = False
    sample_mode: str | None = None
    """What of the encoder's distribution; None for what the trainer itself takes."""

    models: ClassVar[dict[str, Any]]
    """What is known of each model, by the key of its endpoint."""
    sampled: ClassVar[str] = "sample"
    together: ClassVar[int] = 1
    """Pictures, at most, that are written together."""
    turns: ClassVar[bool] = False
    """Whether pictures are turned as their EXIF says."""

    def __post_init__(self) -> None:
        if self.models and self.model not in self.models:
            raise ValueError(f"{type(self).__name__} is known for {', '.join(self.models)}, and this is {self.model}")
        if self.sample_mode not in (None, self.sampled) and self.models:
            raise ValueError(f"{type(self).__name__} stores {self.sampled}; --sample-mode is of webdataset alone")
        self.sample_mode = self.sample_mode or self.sampled
        self.scaled = True
        """Whether latents are stored normalised, as the diffusion model takes them."""
        self.buckets: KohyaBuckets | MusubiBuckets | AIToolkitBuckets

    def place(self, size: Size) -> Placement:
        return self.buckets.place(size)

    def resize(self, image: Image.Image, placement: Placement) -> Image.Image:
        """As kohya's trainers do: by OpenCV's area where it shrinks, else by Pillow's Lanczos; then the middle."""
        if image.size != placement.resized:
            if image.width >= placement.resized[0] and image.height >= placement.resized[1]:
                pixels = cv2.resize(np.array(image), placement.resized, interpolation=cv2.INTER_AREA)
                image = Image.fromarray(pixels)
            else:
                image = image.resize(placement.resized, Image.Resampling.LANCZOS)
        left, top = placement.corner
        return image.crop((left, top, left + placement.bucket[0], top + placement.bucket[1]))

    def name(self, picture: Picture) -> Path:
        """What no other picture's latents may be called."""
        return self.files(0, [picture])[0]

    @abstractmethod
    def files(self, index: int, pictures: list[Picture]) -> list[Path]:
        """Of the pictures that are written together, the so manieth of the data set, in the output's folder."""

    @abstractmethod
    def contents(self, encoded: list[Encoded]) -> list[bytes]:
        """What is written into each of `files`."""


@dataclass
class Kohya(Format):
    """sd-scripts' `.npz` beside each picture, as `--cache_latents_to_disk` writes it."""

    models: ClassVar[dict[str, tuple[str, bool, bool]]] = {
        "sd-v1": ("sd", False, False),
        "sdxl": ("sdxl", False, False),
        "sd3": ("sd3", True, False),
        "flux": ("flux", True, True),
    }
    """Suffix; whether keys end in the latents' size; whether they are normalised."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.buckets = KohyaBuckets(self.resolution, self.upscale, most=max(1024, *self.resolution))
        self.suffix, self.sized, self.scaled = self.models[self.model]

    def files(self, index: int, pictures: list[Picture]) -> list[Path]:
        return [pictures[0].sized_name(f"{self.suffix}.npz")]

    def contents(self, encoded: list[Encoded]) -> list[bytes]:
        (one,) = encoded
        height, width = one.latents.shape[-2:]
        end = f"_{height}x{width}" if self.sized else ""
        arrays: dict[str, Any] = {
            f"latents{end}": one.latents.float().numpy(),
            f"original_size{end}": np.array(one.picture.placement.original),
            f"crop_ltrb{end}": np.array(_crop(one.picture.placement)),
        }
        if one.flipped is not None:
            arrays[f"latents_flipped{end}"] = one.flipped.float().numpy()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return [buffer.getvalue()]


def _crop(placement: Placement) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the bucket in the picture, as SDXL is told of them."""
    (width, height), ratio = placement.bucket, placement.original[0] / placement.original[1]
    resized = (height * ratio, height) if width / height > ratio else (width, width / ratio)
    left, top = (width - resized[0]) // 2, (height - resized[1]) // 2
    return left, top, left + resized[0], top + resized[1]


@dataclass
class Musubi(Format):
    """musubi-tuner's latent cache, for its `cache_directory`."""

    models: ClassVar[dict[str, tuple[str, str]]] = {
        "qwen-image": ("qi", "qwen_image"),
        "wan-2.1": ("wan", "wan"),
    }
    """Its short and long names of the architecture."""
    sampled: ClassVar[str] = "argmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flip:
            raise ValueError("musubi-tuner reads no flipped latents")
        self.buckets = MusubiBuckets(self.resolution, self.upscale)
        self.short, self.long = self.models[self.model]

    def files(self, index: int, pictures: list[Picture]) -> list[Path]:
        return [pictures[0].sized_name(f"{self.short}.safetensors")]

    def contents(self, encoded: list[Encoded]) -> list[bytes]:
        (one,) = encoded
        dtype = str(one.latents.dtype).removeprefix("torch.")
        sizes = "x".join(map(str, one.latents.shape[1:]))
        width, height = map(str, one.picture.placement.original)
        metadata = {"architecture": self.long, "width": width, "height": height, "format_version": "1.0.1"}
        return [save({f"latents_{sizes}_{dtype}": one.latents.contiguous()}, metadata)]


@dataclass
class AIToolkit(Format):
    """ai-toolkit's `_latent_cache` beside each picture, as `cache_latents_to_disk` writes it."""

    models: ClassVar[dict[str, tuple[str, int]]] = {
        "sd-v1": ("sd1", 8),
        "sdxl": ("sdxl", 8),
        "sd3": ("sd3", 16),
        "flux": ("flux1", 16),
    }
    """Its name of the latents' space, and what sides are multiples of."""
    turns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.space, steps = self.models[self.model]
        self.buckets = AIToolkitBuckets(self.resolution, steps)

    def resize(self, image: Image.Image, placement: Placement) -> Image.Image:
        left, top = placement.corner
        image = image.resize(placement.resized, Image.Resampling.BICUBIC)
        return image.crop((left, top, left + placement.bucket[0], top + placement.bucket[1]))

    def files(self, index: int, pictures: list[Picture]) -> list[Path]:
        return [self._file(pictures[0], flip) for flip in ([False, True] if self.flip else [False])]

    def _about(self, picture: Picture, flip: bool) -> dict[str, Any]:
        """What the trainer tells its caches apart by, in its order."""
        placement = picture.placement
        about = {
            "filename": picture.path.name,
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

    def _file(self, picture: Picture, flip: bool) -> Path:
        about = json.dumps(self._about(picture, flip), sort_keys=True).encode()
        name = base64.urlsafe_b64encode(hashlib.md5(about).digest()).decode().replace("=", "")
        return picture.relative.parent / "_latent_cache" / f"{picture.relative.stem}_{name}.safetensors"

    def contents(self, encoded: list[Encoded]) -> list[bytes]:
        (one,) = encoded
        written = []
        for flip, latents in enumerate((one.latents, one.flipped)):
            if latents is not None:
                about = self._about(one.picture, bool(flip)).items()
                metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about}
                written.append(save({"latent": latents.contiguous()}, {**metadata, "format": "pt"}))
        return written


@dataclass
class WebDataset(Format):
    """Shards of a thousand pictures: `latents.npy` or `moments.npy`, `json`, and the caption beside it as `txt`."""

    models: ClassVar[dict[str, Any]] = {}  # all
    sampled: ClassVar[str] = "moments"
    together: ClassVar[int] = 1000
    turns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.buckets = KohyaBuckets(self.resolution, self.upscale, most=max(1024, *self.resolution))
        self.scaled = self.sample_mode != "moments"

    def name(self, picture: Picture) -> Path:
        """The sample's key; what follows a dot in the name of a member is its kind."""
        return Path(picture.relative.with_suffix("").as_posix().replace(".", "_"))

    def files(self, index: int, pictures: list[Picture]) -> list[Path]:
        return [Path(f"shard-{index:06d}.tar")]

    def contents(self, encoded: list[Encoded]) -> list[bytes]:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for each in encoded:
                for name, data in self._members(each).items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        return [buffer.getvalue()]

    def _members(self, encoded: Encoded) -> dict[str, bytes]:
        picture, kind = encoded.picture, "moments" if self.sample_mode == "moments" else "latents"
        key = self.name(picture).as_posix()
        about = {
            "file": picture.relative.as_posix(),
            "model": self.model,
            "normalized": self.scaled,
            "sample_mode": self.sample_mode,
            "original_size": picture.placement.original,
            "bucket": picture.placement.bucket,
            "crop_ltrb": _crop(picture.placement),
        }
        members = {f"{key}.{kind}.npy": _npy(encoded.latents), f"{key}.json": json.dumps(about).encode()}
        if encoded.flipped is not None:
            members[f"{key}.{kind}_flipped.npy"] = _npy(encoded.flipped)
        caption = picture.path.with_suffix(".txt")
        return {**members, f"{key}.txt": caption.read_bytes()} if caption.is_file() else members


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
