"""Tests of the files for SimpleTuner, against the results of its own code in trainers.json."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from remote_vae.latents.format import ImageFile
from remote_vae.latents.simpletuner import SimpleTuner, SimpleTunerVideos
from remote_vae.latents.storage import LocalFolder
from tests.remote_vae.test_latents import failures
from tests.remote_vae.test_trainers import TRAINERS, sample_image
from tests.remote_vae.test_videos import encode_locally, save_video
from tests.support import forked
from tests.support.small_service import Service

THEIRS = TRAINERS["simpletuner"]
ENTRY = THEIRS["images"][0][3]
"""Metadata of an image of 300x200."""


def write_metadata(folder: Path, entries: dict[str, Any], id: str = "set", **config: Any) -> str:
    """Write the two files of SimpleTuner's metadata, and return the path of the first."""
    folder.mkdir(exist_ok=True)
    indices = {"config": {"instance_data_dir": str(folder), **config}, "aspect_ratio_bucket_indices": {}}
    (folder / f"aspect_ratio_bucket_indices_{id}.json").write_text(json.dumps(indices))
    path = folder / f"aspect_ratio_bucket_metadata_{id}.json"
    path.write_text(json.dumps({f"{folder}/{name}": entry for name, entry in entries.items()}))
    return str(path)


def make_format(metadata: str | None, arch: str = "sdxl", **options: Any) -> SimpleTuner:
    return SimpleTuner(SimpleTuner.architectures[arch].vae, (1024, 1024), arch=arch, metadata=metadata, **options)


def make_videos(metadata: str, frames: int, arch: str = "wan") -> SimpleTunerVideos:
    vae = SimpleTuner.architectures[arch].vae
    return SimpleTunerVideos(vae, (1024, 1024), arch=arch, metadata=metadata, frames=frames)


def run(folder: Path, url: str, out: Path, arch: str, *more: str, status: int = 0) -> str:
    metadata = folder / "aspect_ratio_bucket_metadata_set.json"
    options = ["--format", "simpletuner", "--arch", arch, "--metadata", str(metadata), "--out", str(out), *more]
    actual, _, errors = forked.run("-m", "remote_vae", "latents", url, str(folder), *options, COLUMNS="200")
    assert actual == status, errors
    assert "Traceback" not in errors
    return errors


@pytest.mark.parametrize("row", THEIRS["images"], ids=lambda row: f"{row[0]}-{row[1]}-{row[2][0]}")
def test_pixels(row: list[Any], tmp_path: Path) -> None:
    """Compare within a difference of 1 of 255, because OpenCV's versions round differently."""
    config, mode, size, entry, theirs = row
    name = "a.jpg" if mode == "CMYK" else "a.png"
    metadata = write_metadata(tmp_path, {name: entry}, **THEIRS["config"][config])
    sample_image(mode, tuple(size)).save(tmp_path / name, quality=100)
    format, folder = make_format(metadata), LocalFolder(tmp_path)
    with (tmp_path / name).open("rb") as file:
        image = ImageFile(folder, Path(name), format.place(format.read_size(file), Path(name)))
    ((_, pixels),) = format.parts(image, folder)
    assert pixels.shape[1:3] == tuple(entry["target_size"][::-1])
    np.testing.assert_allclose(pixels[0, 4::40, 4::40].reshape(-1), theirs, atol=1)


@pytest.mark.parametrize("row", THEIRS["videos"], ids=lambda row: f"{row[0]}-{row[2]}")
def test_frames_of_videos(row: list[Any], tmp_path: Path) -> None:
    """Compare the first and the last frame. The file keeps every pixel, so that no encoder's version matters."""
    config, count, size, frames, entry, theirs = row
    save_video(tmp_path / "a.mkv", count, tuple(size), codec="ffv1")
    metadata = write_metadata(tmp_path, {"a.mkv": entry}, video={"num_frames": frames}, **THEIRS["config"][config])
    format, folder = make_videos(metadata, frames), LocalFolder(tmp_path)
    with (tmp_path / "a.mkv").open("rb") as file:
        image = ImageFile(folder, Path("a.mkv"), format.place(format.read_size(file), Path("a.mkv")))
    ((part, pixels),) = format.parts(image, folder)
    assert part.clip == (0, frames)
    assert pixels.shape == (frames, *entry["target_size"][::-1], 3)
    np.testing.assert_allclose(pixels[[0, -1], 4::40, 4::40].reshape(-1), theirs, atol=1)


@pytest.mark.parametrize(("instance_data_dir", "folder", "image", "theirs"), THEIRS["names"])
def test_names(instance_data_dir: str, folder: str, image: str, theirs: str, tmp_path: Path) -> None:
    format = make_format(write_metadata(tmp_path, {image: ENTRY}, instance_data_dir=instance_data_dir))
    placement = format.place((300, 200), Path(image))
    format.folder = folder
    assert format.files([ImageFile(LocalFolder(tmp_path), Path(image), placement)]) == [Path(theirs)]


def test_every_architecture_has_a_row() -> None:
    rows = {name: row.vae for name, row in SimpleTuner.architectures.items()}
    assert rows == {arch: vae for arch, vae, _ in THEIRS["latents"]}


@torch.no_grad()
@pytest.mark.parametrize("arch", ["sdxl", "flux2", "krea2", "anima", "sana", "kandinsky5-video"])
def test_latents(service: Service, tmp_path: Path, arch: str) -> None:
    """Compare each kind of latents with local encoding. SimpleTuner's own code gives the same, with the same noise."""
    vae_key, shape = next(row[1:] for row in THEIRS["latents"] if row[0] == arch)
    folder, name = tmp_path / "images", Path("more", "a b.c.png")
    entry = {**ENTRY, "target_size": [256, 256], "intermediary_size": [384, 256], "crop_coordinates": [0, 64]}
    metadata = write_metadata(folder, {str(name): entry})
    (folder / "more").mkdir()
    sample_image("RGB", (300, 200)).save(folder / name)
    sample_image("RGB", (300, 200)).save(folder / "unlisted.png")
    output = run(folder, f"{service.url}/{vae_key}", tmp_path / "out", arch)
    assert "1 encoded" in output
    assert "SimpleTuner does not load them: 1 .png" in output
    format = make_format(metadata, arch)
    image = ImageFile(LocalFolder(folder), name, format.place((300, 200), name))
    ((_, pixels),) = format.parts(image, LocalFolder(folder))
    (file,) = format.files([image])
    ours = torch.load(tmp_path / "out" / file)
    assert list(ours.shape) == shape
    theirs = encode(service.model(vae_key), pixels, zlib.crc32(name.as_posix().encode()), format)
    torch.testing.assert_close(ours, theirs.reshape(shape), atol=1e-3, rtol=1e-3)
    assert (tmp_path / "out" / file).stat().st_size < ours.nbytes + 4096  # no other image's latents


def encode(vae: Any, pixels: np.ndarray[Any, Any], seed: int, format: SimpleTuner) -> torch.Tensor:
    """Return the latents that SimpleTuner stores, if it samples with this seed."""
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    values = values if format.architecture.unit_range else values * 2 - 1
    if "DC" in type(vae).__name__:
        return vae.encode(values).latent
    is_video = "Qwen" in type(vae).__name__ or "Video" in type(vae).__name__
    distribution = vae.encode(values.unsqueeze(2) if is_video else values).latent_dist
    mode, noise = distribution.mode(), torch.Generator().manual_seed(seed)
    latents = mode if format.sample_mode == "argmax" else distribution.sample(noise)
    if "Qwen" in type(vae).__name__:
        mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        return (latents - mean) / std
    if "Flux2" in type(vae).__name__:
        mean, variance = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
        patches = torch.nn.functional.pixel_unshuffle(latents, 2)
        return (patches - mean) / (variance + vae.config.batch_norm_eps).sqrt()
    return (latents - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor


@torch.no_grad()
def test_videos(service: Service, tmp_path: Path) -> None:
    """Compare the latents of the first frames with local encoding. SANA-Video's pixels are in [0, 1]."""
    folder, sizes = tmp_path / "videos", {"original_size": [160, 96], "intermediary_size": [160, 96]}
    for name, count in (("a.mp4", 12), ("short.mp4", 5)):
        save_video(folder / name, count, (160, 96))
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:300])
    entry = {**sizes, "target_size": [96, 96], "crop_coordinates": [0, 32]}
    metadata = write_metadata(folder, dict.fromkeys(("a.mp4", "cut.mp4", "short.mp4"), entry), video={"num_frames": 9})
    options = (folder, f"{service.url}/wan-2.1", tmp_path / "out", "sanavideo", "--frames", "9")
    assert "1 encoded, 0 already stored, 2 failed" in run(*options, status=1)
    assert "the video has 5 frames that can be read: expected 9" in failures(tmp_path / "out")["short.mp4"]
    assert "0 encoded, 1 already stored, 2 failed" in run(*options, status=1)
    (file,) = (tmp_path / "out").glob("*.pt")
    format = make_videos(metadata, 9, "sanavideo")
    image = ImageFile(LocalFolder(folder), Path("a.mp4"), format.place((160, 96), Path("a.mp4")))
    ((_, pixels),) = format.parts(image, LocalFolder(folder))
    theirs = encode_locally(service.model("wan-2.1"), torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 255)
    torch.testing.assert_close(torch.load(file), theirs, atol=1e-4, rtol=1e-4)


def test_jpeg_files_are_decoded_here_for_other_ranges(tmp_path: Path) -> None:
    """Test that a JPEG of the right size is sent as it is only if its pixels are encoded in [-1, 1]."""
    sizes = {name: [64, 64] for name in ("original_size", "intermediary_size", "target_size")}
    metadata = write_metadata(tmp_path, {"a.jpg": {**sizes, "crop_coordinates": [0, 0]}})
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg")
    for arch, is_sent in (("wan", True), ("longcat_video", False)):
        format = make_format(metadata, arch)
        image = ImageFile(LocalFolder(tmp_path), Path("a.jpg"), format.place((64, 64), Path("a.jpg")))
        assert (format.jpeg(image) is not None) == is_sent


def test_refused_videos(tmp_path: Path) -> None:
    """Test metadata of videos without --frames, of images with it, and other numbers of frames."""
    videos = write_metadata(tmp_path / "videos", {"a.mp4": ENTRY}, video={"num_frames": 9})
    images = write_metadata(tmp_path / "images", {"a.png": ENTRY})
    with pytest.raises(ValueError, match="it is of videos; add --frames 9"):
        make_format(videos)
    with pytest.raises(ValueError, match="expected --frames 9, its num_frames"):
        make_videos(videos, 5)
    with pytest.raises(ValueError, match="expected no --frames, since it is of images"):
        make_videos(images, 9)
    with pytest.raises(ValueError, match="anima has no videos; expected one of wan, "):
        make_videos(videos, 9, "anima")


def test_other_sizes_are_refused(service: Service, tmp_path: Path) -> None:
    """Test images that changed after the scan, and a data backend that changed after an earlier run."""
    folder, url = tmp_path / "images", f"{service.url}/sdxl"
    write_metadata(folder, {"a.png": ENTRY, "b.png": ENTRY, "c.png": ENTRY}, resolution=512)
    for name, mode, size in (("a", "RGB", (300, 200)), ("b", "RGB", (200, 300)), ("c", "LA", (300, 200))):
        sample_image(mode, size).save(folder / f"{name}.png")
    assert "1 encoded" in run(folder, url, tmp_path / "out", "sdxl", status=1)
    reasons = failures(tmp_path / "out")
    assert "200x300 pixels, and 300x200 in --metadata" in reasons["b.png"]
    assert "images of mode LA in its own way; save it as RGB" in reasons["c.png"]
    write_metadata(folder, {"a.png": ENTRY}, resolution=768)
    assert "made with backend={" in run(folder, url, tmp_path / "out", "sdxl", status=1)


@pytest.mark.parametrize(
    ("entry", "arch", "message"),
    [
        ({"target_size": [256, 200]}, "wan", "expected a part of it, with sides that are multiples of 16"),
        ({"target_size": [384, 192]}, "sdxl", "crops 384x192 from 320x213"),
        ({"crop_coordinates": [30, 0]}, "sdxl", "crops 320x192 from 320x213"),
    ],
)
def test_refused_placements(entry: dict[str, Any], arch: str, message: str, tmp_path: Path) -> None:
    format = make_format(write_metadata(tmp_path, {"a.png": {**ENTRY, **entry}}), arch)
    with pytest.raises(ValueError, match=message):
        format.place((300, 200), Path("a.png"))


@pytest.mark.parametrize("value", [None, 256, [256], ["a", "b"]])
def test_incomplete_entries_are_refused(value: Any, tmp_path: Path) -> None:
    """Test entries that lack a pair of numbers, or have something else in its place."""
    entries = {"a.png": {**ENTRY, "target_size": value}, "b.png": {"original_size": [300, 200]}, "c.png": None}
    format = make_format(write_metadata(tmp_path, entries))
    for name, missing in (("a.png", "target_size"), ("b.png", "intermediary_size"), ("c.png", "original_size")):
        with pytest.raises(ValueError, match=f"its {missing} in --metadata is missing or not two numbers; delete"):
            format.place((300, 200), Path(name))


def test_refused_options(tmp_path: Path) -> None:
    metadata = write_metadata(tmp_path, {"a.png": ENTRY})
    for options in ({"flip": True}, {"upscale": False}, {"sample_mode": "argmax"}):
        with pytest.raises(ValueError, match=r"remove them|stores sample"):
            make_format(metadata, **options)
    with pytest.raises(ValueError, match="has the sizes"):
        SimpleTuner("sdxl", (512, 512), metadata=metadata)
    with pytest.raises(ValueError, match="add --metadata"):
        make_format(None)
    with pytest.raises(ValueError, match=r"expected aspect_ratio_bucket_metadata_<id>\.json"):
        make_format(metadata.replace("metadata_set", "indices_set"))


def test_refused_metadata(tmp_path: Path) -> None:
    sizes = {"crop": True, "maximum_image_size": 2, "target_downsample_size": 1}
    for entries, config, message in (
        ({"a.png": ENTRY}, sizes, "lacks the sizes before the crop"),
        ({"a.png": ENTRY}, {"instance_data_dir": None}, "expected a backend of type local"),
        ({}, {}, "has no image in its folder"),
    ):
        with pytest.raises(ValueError, match=message):
            make_format(write_metadata(tmp_path, entries, **config))
    for text, message in (("{", "cannot be read"), ("[]", "has no object")):
        Path(write_metadata(tmp_path, {})).write_text(text)
        with pytest.raises(ValueError, match=message):
            make_format(f"{tmp_path}/aspect_ratio_bucket_metadata_set.json")
    (tmp_path / "aspect_ratio_bucket_metadata_set.json").unlink()
    with pytest.raises(ValueError, match=re.escape("No such file")):
        make_format(f"{tmp_path}/aspect_ratio_bucket_metadata_set.json")
