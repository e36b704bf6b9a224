"""Tests of `remote-vae latents`: the trainers' files equal local encoding, also after interruptions."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from remote_vae.latents.format import Format
from remote_vae.latents.formats import FORMATS
from scripts.local_server import ROOT
from tests.support import forked
from tests.support.faulty_proxy import FaultyProxy, faulty_proxy
from tests.support.forked import killed_at_the_end
from tests.support.small_service import Service
from tests.support.values import TOLERANCE

SIZES = [(300, 200), (200, 300), (256, 256), (100, 90), (640, 200), (128, 128), (90, 100), (257, 255)]


def command(folder: Path, out: Path, url: str, format: str, *more: str) -> list[str]:
    options = ["--out", str(out), "--format", format, "--resolution", "128", *more]
    return [sys.executable, "-m", "remote_vae", "latents", url, str(folder), *options]


def run(*arguments: Any, status: int = 0) -> str:
    _, *module = command(*arguments)
    actual, _, errors = forked.run(*module, COLUMNS="200")
    assert actual == status, errors
    assert "Traceback" not in errors
    return errors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of images of many sizes, with captions. Some are in a subfolder."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for index, size in enumerate(SIZES):
        image = Image.radial_gradient("L").resize(size).rotate(45 * index)
        colors = Image.merge("RGB", [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image])
        colors.save(folder / ("more" if index % 2 else ".") / f"p{index}.png")
        (folder / ("more" if index % 2 else ".") / f"p{index}.txt").write_text(f"caption {index}")
    return folder


def local(vae: Any, format: Format, folder: Path, name: Path, flip: bool = False) -> torch.Tensor:
    """Return the latents that a trainer with this VAE stores, if it samples with the image's seed."""
    image = read_image(folder / name)
    images = format.pixels(image, format.place(image.size))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    posterior = vae.encode(pixels.unsqueeze(2) if "Qwen" in type(vae).__name__ else pixels).latent_dist
    if format.sample_mode == "moments":
        return posterior.parameters[int(flip)]
    seed = zlib.crc32(name.as_posix().encode())
    latents = posterior.mode()
    if format.sample_mode == "sample":
        latents = posterior.sample(torch.Generator().manual_seed(seed))
    if format.normalized and vae.config.get("latents_mean"):
        shape = (1, -1, 1, 1, 1)
        latents = (latents - torch.tensor(vae.config.latents_mean).view(shape)) / torch.tensor(
            vae.config.latents_std
        ).view(shape)
    elif format.normalized:
        latents = (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    return latents[int(flip)]


def read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def failures(out: Path) -> dict[str, str]:
    """Return the reason by the name of each image that could not be encoded."""
    (listed,) = out.glob(".remote-vae/*.failed.txt")
    return dict(line.split("\t") for line in listed.read_text(errors="surrogateescape").splitlines())


def names(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*.png"))


def close(ours: Any, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(ours), theirs, atol=10 * TOLERANCE, rtol=10 * TOLERANCE)


@pytest.mark.parametrize(("key", "end"), [("sdxl", ""), ("flux", "_{}x{}")])
@torch.no_grad()
def test_kohya(service: Service, folder: Path, tmp_path: Path, key: str, end: str) -> None:
    assert "8 encoded" in run(folder, tmp_path / "out", f"{service.url}/{key}", "kohya", "--flip")
    format = FORMATS["kohya"](key, (128, 128), flip=True)
    for name in names(folder):
        width, height = size = read_image(folder / name).size
        file = np.load(tmp_path / "out" / name.parent / f"{name.stem}_{width:04d}x{height:04d}_{key}.npz")
        bucket = format.place(size).bucket
        suffix = end.format(bucket[1] // 8, bucket[0] // 8)
        assert sorted(file) == sorted(
            f"{name}{suffix}" for name in ("latents", "latents_flipped", "original_size", "crop_ltrb")
        )
        close(file[f"latents{suffix}"], local(service.model(key), format, folder, name))
        close(file[f"latents_flipped{suffix}"], local(service.model(key), format, folder, name, flip=True))
        assert tuple(file[f"original_size{suffix}"]) == size


@torch.no_grad()
def test_musubi(service: Service, folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out", f"{service.url}/qwen-image", "musubi")
    format = FORMATS["musubi"]("qwen-image", (128, 128))
    for name in names(folder):
        width, height = size = read_image(folder / name).size
        bucket = format.place(size).bucket
        with safe_open(
            tmp_path / "out" / name.parent / f"{name.stem}_{width:04d}x{height:04d}_qi.safetensors", "pt"
        ) as file:
            (key,) = file.keys()
            assert key == f"latents_1x{bucket[1] // 8}x{bucket[0] // 8}_float32"
            close(file.get_tensor(key), local(service.model("qwen-image"), format, folder, name))
            assert file.metadata()["architecture"] == "qwen_image"


@torch.no_grad()
def test_ai_toolkit(service: Service, folder: Path) -> None:
    run(folder, folder, f"{service.url}/flux", "ai-toolkit", "--flip")
    format = FORMATS["ai-toolkit"]("flux", (128, 128), flip=True)
    for name in names(folder):
        files = sorted((folder / name.parent / "_latent_cache").glob(f"{name.stem}_*.safetensors"))
        assert len(files) == 2
        for path in files:
            with safe_open(path, "pt") as file:
                flip = "flip_x" in file.metadata()
                close(file.get_tensor("latent"), local(service.model("flux"), format, folder, name, flip=flip))


@torch.no_grad()
def test_webdataset(service: Service, folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out", f"{service.url}/sd-v1", "webdataset")
    format = FORMATS["webdataset"]("sd-v1", (128, 128))
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}
    assert list(files)[:3] == ["more/p1.moments.npy", "more/p1.json", "more/p1.txt"]
    for name in names(folder):
        key = name.with_suffix("").as_posix()
        close(np.load(io.BytesIO(files[f"{key}.moments.npy"])), local(service.model("sd-v1"), format, folder, name))
        assert json.loads(files[f"{key}.json"])["file"] == name.as_posix()
        assert files[f"{key}.txt"].decode().startswith("caption")
    Image.new("RGB", (128, 128)).save(folder / "new.png")
    assert "1 encoded, 8 already stored" in run(folder, tmp_path / "out", f"{service.url}/sd-v1", "webdataset")
    with tarfile.open(tmp_path / "out" / "shard-000001.tar") as archive:
        assert archive.getnames() == ["new.moments.npy", "new.json"]


def test_unreadable_images_are_listed(service: Service, folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "cut.png").write_bytes((folder / "p0.png").read_bytes()[:400])
    Image.new("RGB", SIZES[0]).save(folder / "p0.jpg")  # the latents of p0.png would have the same name
    (folder / "note.txt").write_text("no image")
    out = tmp_path / "out"
    output = run(folder, out, f"{service.url}/sdxl", "kohya", status=1)
    assert "8 encoded, 0 already stored, 3 failed" in output
    listed = failures(out)
    assert sorted(listed) == ["broken.png", "cut.png", "p0.png"]
    assert listed["p0.png"] == "its latents would have the same name as those of p0.jpg; rename the image"
    for name in listed:
        (folder / name).unlink()
    assert "0 encoded, 8 already stored, 0 failed" in run(folder, out, f"{service.url}/sdxl", "kohya")
    assert not list(out.glob(".remote-vae/*.failed.txt"))


@pytest.mark.parametrize("format", ["kohya", "webdataset"])
def test_two_images_with_one_name_are_reported_each_time(service: Service, tmp_path: Path, format: str) -> None:
    """Report the second image even if the latents of the first are already stored.

    `a.b` and `a_b` are one key of a WebDataset.
    """
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for name in ("a_b.png", "a_b.jpg") if format == "kohya" else ("a.b.png", "a_b.png"):
        Image.new("RGB", (128, 128)).save(folder / name)
    for encoded, stored in ((1, 0), (0, 1)):
        output = run(folder, out, f"{service.url}/sdxl", format, status=1)
        assert f"{encoded} encoded, {stored} already stored, 1 failed" in output
    if format == "webdataset":
        with tarfile.open(out / "shard-000000.tar") as archive:
            assert archive.getnames() == ["a_b.moments.npy", "a_b.json"]


def test_other_settings_are_refused(service: Service, folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out", f"{service.url}/sdxl", "kohya")
    for options, message in (
        (("--seed", "1"), "made with seed=0; use the same, or another --out"),
        (("--no-upscale",), "made with upscale=True"),
        (("--resolution", "256"), "made with resolution=[128, 128]"),
        (
            ("--format", "ai-toolkit", "--resolution", "1280x720"),
            "1280x720: expected one side; 960 has about",
        ),
        (("--format", "musubi"), "musubi-tuner has no format for latents of sdxl: expected one of qwen-image, wan-2.1"),
        (("--format", "lora"), "expected one of kohya, musubi, ai-toolkit, simpletuner, webdataset"),
        (("--resolution", "big"), "expected 1024, or 1280x720"),
    ):
        assert message in run(folder, tmp_path / "out", f"{service.url}/sdxl", "kohya", *options, status=1)


@pytest.fixture
def faulty(service: Service) -> Iterator[FaultyProxy]:
    with faulty_proxy(f"{service.url}/sdxl") as faulty:
        yield faulty


def test_a_refused_token_ends_the_run(faulty: FaultyProxy, folder: Path, tmp_path: Path) -> None:
    faulty.response = (401, "Unauthorized")
    assert "401 Unauthorized" in run(folder, tmp_path / "out", faulty.url, "kohya", status=1)
    faulty.response = None
    assert "8 encoded" in run(folder, tmp_path / "out", faulty.url, "kohya")


def test_ctrl_c_ends_at_once(faulty: FaultyProxy, folder: Path, tmp_path: Path) -> None:
    faulty.hangs = True
    process = subprocess.Popen(command(folder, tmp_path / "out", faulty.url, "kohya"), cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    with killed_at_the_end(process):
        while not any(method == "POST" for method, _, _ in faulty.seen) and time.monotonic() < deadline:
            time.sleep(0.02)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert time.monotonic() - start < 20  # the proxy hangs for 60 s
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_a_run_continues_after_kill_9_at_any_moment(faulty: FaultyProxy, tmp_path: Path) -> None:
    """Kill it ten times. No latents are lost or written twice, and no file is incomplete."""
    folder, out, rng = tmp_path / "images", tmp_path / "out", random.Random(0)
    folder.mkdir()
    for index in range(75):
        Image.new("RGB", (130 + index, 128), (index, 0, 0)).save(folder / f"{index}.png")
    written: dict[str, int] = {}

    def check() -> None:
        for path in out.rglob("*.npz"):
            moment = path.stat().st_mtime_ns
            assert written.setdefault(path.name, moment) == moment
            assert np.load(path)["latents"].shape[0] == 4

    for _ in range(10):
        posts = sum(method == "POST" for method, _, _ in faulty.seen) + rng.randint(0, 6)
        _, *module = command(folder, out, faulty.url, "kohya", "--workers", "2")
        process = forked.Process(module, dict(os.environ), tmp_path / "output", tmp_path / "output")
        while sum(method == "POST" for method, _, _ in faulty.seen) <= posts and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait(10)
        check()
    assert 0 < len(written) < 75
    run(folder, out, faulty.url, "kohya")
    check()
    assert len(written) == 75
    assert not list(out.rglob(".*.part"))
