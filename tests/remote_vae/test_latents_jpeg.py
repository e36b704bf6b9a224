"""Tests of JPEG files that `remote-vae latents` sends as they are, because a trainer would not change their pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from remote_vae.latents.buckets import Placement
from remote_vae.latents.format import ImageFile
from remote_vae.latents.formats import FORMATS
from remote_vae.latents.storage import LocalFolder
from tests.remote_vae.test_latents import close, local, run
from tests.remote_vae.test_latents_scale import encode
from tests.support.sleeping_service import sleeping_service
from tests.support.small_service import Service


def save_jpeg(path: Path, size: tuple[int, int], mode: str = "RGB", orientation: int | None = None) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.radial_gradient("L").resize(size).rotate(45)
    colors = Image.merge("RGB", [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image]).convert(mode)
    options = {}
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    colors.save(path, "jpeg", **options)
    return path.read_bytes()


@pytest.mark.parametrize(("key", "format"), [("flux", "kohya"), ("qwen-image", "musubi")])
@torch.no_grad()
def test_latents_of_a_sent_file_equal_local_encoding(service: Service, tmp_path: Path, key: str, format: str) -> None:
    """Encode a color and a gray file, and one with an orientation that these trainers do not apply."""
    for name, options in {"rgb": (), "gray": ("L",), "turned": ("RGB", 6)}.items():
        save_jpeg(tmp_path / f"{name}.jpg", (128, 128), *options)
    assert "3 encoded" in run(tmp_path, tmp_path / "out", f"{service.url}/{key}", format)
    rules = FORMATS[format](key, (128, 128))
    for name in ("rgb", "gray", "turned"):
        expected = local(service.model(key), rules, tmp_path, Path(f"{name}.jpg"))
        if format == "kohya":
            latents: Any = np.load(tmp_path / "out" / f"{name}_0128x0128_flux.npz")["latents_16x16"]
        else:
            (latents,) = load_file(tmp_path / "out" / f"{name}_0128x0128_qi.safetensors").values()
        close(latents, expected)


@pytest.mark.parametrize(
    ("is_sent", "name", "size", "options", "flip"),
    [
        (True, "a.jpg", (128, 128), (), False),
        (True, "a.JPEG", (128, 128), ("L",), False),
        (False, "a.jpg", (128, 128), ("CMYK",), False),
        (False, "a.jpg", (128, 128), ("RGB", 6), False),
        (False, "a.jpg", (130, 128), (), False),
        (False, "a.jpg", (128, 128), (), True),
        (False, "a.png", (128, 128), (), False),
    ],
)
def test_only_a_file_that_needs_no_change_is_sent(
    tmp_path: Path, is_sent: bool, name: str, size: tuple[int, int], options: tuple[Any, ...], flip: bool
) -> None:
    content = save_jpeg(tmp_path / name, size, *options)
    format = FORMATS["kohya"]("sdxl", (128, 128), flip=flip)
    image = ImageFile(LocalFolder(tmp_path), Path(name), format.place(size))
    assert format.jpeg(image) == (content if is_sent else None)
    changed = ImageFile(LocalFolder(tmp_path), Path(name), Placement((64, 64), (64, 64), (64, 64)))
    assert format.jpeg(changed) is None  # the file is not the one whose size was read


def test_pixels_are_sent_if_the_file_is_refused(tmp_path: Path) -> None:
    content = save_jpeg(tmp_path / "images" / "a.jpg", (64, 64))
    with sleeping_service() as service:
        encode(tmp_path / "images", tmp_path / "sent", [service.url])
        assert service.received == [len(content)]
        service.refuses, service.refusal = content[:1], 422
        result = encode(tmp_path / "images", tmp_path / "refused", [service.url])
        assert (result.encoded, result.failures.count) == (1, 0)
        assert service.received[1:] == [len(content), 64 * 64 * 3]
