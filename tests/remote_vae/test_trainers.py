"""Tests of buckets, pixels, file names and file types of the trainers, against the results of their own code.

trainers.json has these results. Somebody ran the trainers' functions by hand, at the commits in the file. null: the
trainer's code fails.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load

from remote_vae import Client
from remote_vae.latents.ai_toolkit import AIToolkitVideos
from remote_vae.latents.buckets import Placement
from remote_vae.latents.format import Encoded, Format, ImageFile, crop_ltrb
from remote_vae.latents.formats import FORMATS
from remote_vae.latents.musubi import Musubi, MusubiVideos
from remote_vae.latents.run import Run
from remote_vae.latents.storage import LocalFolder
from remote_vae.latents.videos import Sampling, spread
from tests.remote_vae.test_videos import save_video

pytestmark = pytest.mark.slow

TRAINERS: dict[str, Any] = json.loads(Path(__file__).with_name("trainers.json").read_text())


def sample_image(mode: str, size: tuple[int, int]) -> Image.Image:
    """Return gradients and squares, which every method of resizing changes differently. `P` is partly transparent."""
    y, x = np.mgrid[: size[1], : size[0]]
    squares = (x // 7 + y // 5) % 2 * 255
    red, green = x * 255 // max(size[0] - 1, 1), y * 255 // max(size[1] - 1, 1)
    pixels = np.stack([red, green, squares, (x // 9 + y // 11) % 2 * 255], axis=-1).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray((red * 200 + squares).astype(np.uint16))
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = 3
        return image
    return image.convert(mode)


BY_TRAINER = {format.trainer: format for format in FORMATS.values()}


@pytest.mark.parametrize("trainer", TRAINERS["trainers"])
def test_buckets_and_names(trainer: str) -> None:
    ours = [[*row[:4], *bucket_and_names(trainer, *row[:4])] for row in TRAINERS["buckets"][trainer]]
    assert [row for row in ours if row not in TRAINERS["buckets"][trainer]] == []


def make_format(trainer: str, arch: str, resolution: list[int], upscale: bool = True, flip: bool = False) -> Format:
    """Return the format of a trainer for one of its architectures."""
    cls = BY_TRAINER[trainer]
    return cls(cls.architectures[arch].vae, tuple(resolution), upscale, flip, arch=arch)


def bucket_and_names(trainer: str, arch: str, resolution: list[int], upscale: bool, size: list[int]) -> list[Any]:
    """Return the last columns of the table of buckets from our functions."""
    format = make_format(trainer, arch, resolution, upscale, flip=trainer == "ai-toolkit")
    try:
        placement = format.place(tuple(size))
    except ValueError:  # too narrow
        sizes, placement = None, Placement(tuple(size), (1, 1), (1, 1))
    else:
        more = {"sd-scripts": [[*crop_ltrb(placement)]], "ai-toolkit": [[*placement.corner]]}.get(trainer, [])
        sizes = [[*placement.resized], [*placement.bucket], *more]
    image = ImageFile(LocalFolder(Path("/d")), Path("a b.c.png"), placement)
    return [sizes, [file.as_posix() for file in format.files([image])]]


@pytest.mark.parametrize("trainer", TRAINERS["trainers"])
def test_every_architecture_has_rows(trainer: str) -> None:
    """Test that no architecture is without the trainer's own results."""
    assert {row[0] for row in TRAINERS["buckets"][trainer]} == BY_TRAINER[trainer].architectures.keys()


@pytest.mark.parametrize("trainer", ["sd-scripts", "musubi-tuner"])
def test_contents(trainer: str, tmp_path: Path) -> None:
    """Compare keys, shapes and metadata of the file of an image of 256x192."""
    for arch, shapes, metadata in TRAINERS["contents"][trainer]:
        format = make_format(trainer, arch, [256, 256], flip=trainer == "sd-scripts")
        folder = LocalFolder(tmp_path)
        image = ImageFile(folder, Path("a.png"), Placement((256, 192), (256, 192), (256, 192)))
        shape = next(shape for key, shape in shapes.items() if key.startswith("latents"))
        latents = torch.zeros([32, 24, 32] if arch == "ideogram4" else shape)
        path = tmp_path / format.files([image])[0]
        (data,) = format.contents([Encoded(image, latents, latents if format.flip else None)], folder)
        path.write_bytes(data)
        if trainer == "sd-scripts":
            with np.load(path) as file:
                assert {key: list(file[key].shape) for key in sorted(file)} == shapes
            assert format.is_stored(folder, image)
        else:
            with safe_open(path, "pt") as file:
                assert {key: list(file.get_tensor(key).shape) for key in file.keys()} == shapes  # noqa: SIM118
                assert file.metadata() == metadata


def test_first_frames(tmp_path: Path) -> None:
    """Compare the keys, the mask and the latents of first frames, and for Kandinsky 5 of the last ones."""
    folder = LocalFolder(tmp_path)
    for arch, frames, shapes, values in TRAINERS["i2v"]["musubi-tuner"]:
        is_wan = arch == "wan"
        format = MusubiVideos(Musubi.architectures[arch].vae, (64, 64), arch=arch, i2v=is_wan)
        channels, scale = ([0, 3, 4, 5, 19], 1) if is_wan else ([0, 1, 15], 0.476986)
        pixels = (np.arange(frames * 16 * 24 * 3) % 251).reshape(frames, 16, 24, 3).astype(np.uint8)
        image = ImageFile(folder, Path("a.mp4"), Placement((24, 16), (24, 16), (24, 16)), clip=(0, frames))
        first = format.first_frame(pixels)
        encoded = Encoded(image, mean_latents(pixels) * scale, first=None if first is None else mean_latents(first))
        (data,) = format.contents([encoded], folder)
        arrays = load(data)
        assert {key: list(array.shape) for key, array in arrays.items()} == shapes
        (latents,) = (array for key, array in arrays.items() if key.startswith("latents_image"))
        np.testing.assert_allclose(latents[channels, :, 1, 2], values, atol=1e-5)


def mean_latents(pixels: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return the mean of the pixels of each latent [16, F, h, w], in [-1, 1], in place of a VAE's latents."""
    values = pixels / 127.5 - 1 if pixels.dtype == np.uint8 else pixels
    groups = [values[:1], *(values[start : start + 4] for start in range(1, len(values), 4))]
    frames = np.stack([group.mean(axis=0) for group in groups])
    count, height, width, _ = frames.shape
    means = frames.reshape(count, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4))
    return torch.from_numpy(means).float().permute(3, 0, 1, 2)[[channel % 3 for channel in range(16)]]


def test_patches_of_ideogram(tmp_path: Path) -> None:
    """Compare the order of the channels."""
    ((latents, theirs),) = TRAINERS["patches"]["musubi-tuner"]
    folder = LocalFolder(tmp_path)
    image = ImageFile(folder, Path("a.png"), Placement((32, 16), (32, 16), (32, 16)))
    (data,) = make_format("musubi-tuner", "ideogram4", [64, 64]).contents(
        [Encoded(image, torch.tensor(latents))], folder
    )
    (array,) = load(data).values()
    assert array.tolist() == theirs


def test_clips_of_videos(tmp_path: Path) -> None:
    """Compare the names of all clips of videos."""
    for arch, count, options, names in TRAINERS["clips"]["musubi-tuner"]:
        video = tmp_path / f"{count}" / "a b.c.mp4"
        if not video.exists():
            save_video(video, count)
        frames, *others = options
        sampling = Sampling(tuple(frames), *others)
        format = MusubiVideos(Musubi.architectures[arch].vae, (96, 64), arch=arch, sampling=sampling)
        folder = LocalFolder(video.parent)
        with video.open("rb") as file:
            image = ImageFile(folder, Path(video.name), format.place(format.read_size(file)))
        if not names:
            with pytest.raises(ValueError, match="too few for clips"):
                list(format.parts(image, folder))
            continue
        ours: list[str] = []
        for part, pixels in format.parts(image, folder):
            assert part.clip
            assert pixels.shape == (part.clip[1], 64, 80, 3)
            ours += [file.name for file in format.files([part])]
        assert sorted(ours) == names, (arch, count, options)


def test_videos_of_ai_toolkit(tmp_path: Path) -> None:
    """Compare sizes, names, contents with and without `do_i2v`, and which frames of a video are taken."""
    folder = LocalFolder(tmp_path)
    for row in [*TRAINERS["videos"]["ai-toolkit"], *TRAINERS["i2v"]["ai-toolkit"]]:
        arch, frames, resolution, name, count, size, *theirs, shapes, metadata, last = row
        do_i2v = last if last == "true" else None
        vae = AIToolkitVideos.architectures[arch].vae
        format = AIToolkitVideos(vae, (resolution, resolution), arch=arch, frames=frames, i2v=bool(do_i2v))
        placement = format.place(tuple(size))
        image = ImageFile(folder, Path(name), placement)
        (file,) = format.files([image])
        assert [[[*placement.resized], [*placement.bucket], [*placement.corner]], file.as_posix()] == theirs
        assert do_i2v or spread(count, frames) == last
        latents, first = (torch.zeros(shapes.get(key, 0)) for key in ("latent", "first_frame_latent"))
        encoded = Encoded(replace(image, clip=(0, frames)), latents, first=first if do_i2v else None)
        (data,) = format.contents([encoded], folder)
        path = tmp_path / "file"
        path.write_bytes(data)
        with safe_open(path, "pt") as stored:
            assert {key: list(stored.get_tensor(key).shape) for key in stored.keys()} == shapes  # noqa: SIM118
            assert stored.get_tensor("num_frames") == frames
            assert stored.metadata()["num_frames"] == metadata
            assert stored.metadata().get("do_i2v") == do_i2v


@pytest.mark.parametrize("trainer", TRAINERS["trainers"])
def test_pixels(trainer: str) -> None:
    """Compare within a difference of 1 of 255, because OpenCV's versions round differently."""
    for *row, theirs in TRAINERS["pixels"][trainer]:
        arch, resolution, upscale, flip, mode, size = row
        format = make_format(trainer, arch, resolution, upscale, flip)
        file = io.BytesIO()
        sample_image(mode, tuple(size)).save(file, "png")
        pixels = np.array(format.pixels(Image.open(file), format.place(tuple(size)))[int(flip)])
        np.testing.assert_allclose(pixels[4::40, 4::40].reshape(-1), theirs, atol=1, err_msg=str(row))


@pytest.mark.parametrize("trainer", TRAINERS["loads"])
def test_loaded_files(trainer: str, tmp_path: Path) -> None:
    """Compare also files behind a link to a folder; the table has these for ai-toolkit only."""
    theirs = TRAINERS["loads"][trainer]
    folder = tmp_path / "folder"
    for name in theirs:
        path = (tmp_path / "elsewhere" / "z.png") if name.startswith("link/") else (folder / name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if (tmp_path / "elsewhere").exists():
        (folder / "link").symlink_to(tmp_path / "elsewhere")
    format = make_format(trainer, "qwen_image" if trainer == "musubi-tuner" else "sdxl", [512, 512])
    run = Run(Client("http://127.0.0.1:9"), {"kind": "image"}, folder, tmp_path, format, seed=0, workers=1)
    assert set(run.find()) == {name for name, loaded in theirs.items() if loaded}
