"""Tests of the files that `remote-vae latents` reads, skips, writes and leaves unchanged."""

from __future__ import annotations

import io
import os
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from safetensors import safe_open

from remote_vae.cli import app
from tests.remote_vae.test_latents import failures, run
from tests.support.shards import read_shards
from tests.support.sleeping_service import sleeping_service
from tests.support.small_service import Service, as_tensor


def save(path: Path, size: tuple[int, int] = (128, 128), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize(size).convert(mode).save(path)
    return path


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def test_user_files_are_unchanged(service: Service, tmp_path: Path) -> None:
    """Use the folder of the images as output. Earlier versions wrote or deleted these names."""
    save(tmp_path / "a.png")
    (tmp_path / "failed.png").write_bytes(b"broken")
    for name in ("failed.txt", "remote-vae.json", ".a_0128x0128_sdxl.npz.part"):
        (tmp_path / name).write_text(f"the user's own {name}")
    for _ in range(2):
        run(tmp_path, tmp_path, f"{service.url}/sdxl", "kohya", status=1)
        (tmp_path / "failed.png").unlink(missing_ok=True)
        (tmp_path / "b.png").write_bytes(b"broken")
    (tmp_path / "b.png").unlink()
    run(tmp_path, tmp_path, f"{service.url}/sdxl", "kohya")
    for name in ("failed.txt", "remote-vae.json", ".a_0128x0128_sdxl.npz.part"):
        assert (tmp_path / name).read_text() == f"the user's own {name}"
    new = sorted(path.name for path in tmp_path.iterdir() if path.name not in (name, "failed.txt", "remote-vae.json"))
    assert new == [".remote-vae", "a.png", "a_0128x0128_sdxl.npz"]


def test_user_shards_are_unchanged(service: Service, tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    with tarfile.open(tmp_path / "shard-000000.tar", "w") as archive:
        archive.add(tmp_path / "images" / "a.png", "a.png")
    before = (tmp_path / "shard-000000.tar").read_bytes()
    run(tmp_path / "images", tmp_path, f"{service.url}/sdxl", "webdataset")
    assert (tmp_path / "shard-000000.tar").read_bytes() == before
    assert list(members(tmp_path / "shard-000001.tar")) == ["a.moments.npy", "a.json"]
    (tmp_path / "shard-000000.tar").write_bytes(b"broken")
    output = run(tmp_path / "images", tmp_path, f"{service.url}/sdxl", "webdataset", status=1)
    assert "shard-000000.tar cannot be read as a shard" in output


@pytest.mark.parametrize(
    ("format", "count", "skipped"),
    [
        ("kohya", 5, "sd-scripts does not load them: 1 .gif, 1 .heic, 1 .jfif, 1 .tiff, 1 hidden .png"),
        ("ai-toolkit", 3, "load them: 1 .avif, 1 .bmp, 1 .gif, 1 .heic, 1 .jfif, 1 .tiff, 1 hidden .png"),
        ("webdataset", 8, "webdataset does not load them: 1 .heic, 1 hidden .png"),
    ],
)
def test_file_types(service: Service, tmp_path: Path, format: str, count: int, skipped: str) -> None:
    for suffix in (".avif", ".bmp", ".gif", ".jfif", ".jpg", ".png", ".tiff", ".webp"):
        save(tmp_path / "images" / f"{suffix[1:]}{suffix}")
    save(tmp_path / "images" / ".hidden.png")
    (tmp_path / "images" / "phone.heic").touch()
    (tmp_path / "images" / "notes.txt").touch()
    output = run(tmp_path / "images", tmp_path / "out", f"{service.url}/sdxl", format)
    assert f"{count} encoded" in output
    assert f"{skipped}\n" in output


@pytest.mark.parametrize("content", ["nothing", "images", "texts"])
def test_a_folder_without_images_is_an_error(service: Service, tmp_path: Path, content: str) -> None:
    (tmp_path / "images").mkdir()
    for name in {"nothing": [], "images": ["a.gif", "b.tiff"], "texts": ["a.txt"]}[content]:
        (tmp_path / "images" / name).touch()
    output = run(tmp_path / "images", tmp_path / "out", f"{service.url}/sdxl", "kohya", status=1)
    assert "has no image that sd-scripts loads: expected files with .avif, .bmp" in output
    assert ("1 .gif, 1 .tiff" in output) == (content == "images")
    assert not (tmp_path / "out").exists()


def test_links_to_folders(service: Service, tmp_path: Path) -> None:
    """Test that a loop of links ends. ai-toolkit does not follow links, and the command reports it."""
    save(tmp_path / "elsewhere" / "a.png")
    folder = tmp_path / "images"
    save(folder / "b.png")
    (folder / "1_cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "self").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    assert "2 encoded" in run(folder, tmp_path / "out", f"{service.url}/sdxl", "kohya")
    assert (tmp_path / "out" / "1_cat" / "a_0128x0128_sdxl.npz").is_file()
    output = run(folder, tmp_path / "out", f"{service.url}/sdxl", "ai-toolkit")
    assert "1 encoded" in output
    assert "skipped, because ai-toolkit does not load them: 2 linked folder" in output


@pytest.mark.parametrize("format", ["kohya", "ai-toolkit", "webdataset"])
def test_names_that_are_not_utf_8(service: Service, tmp_path: Path, format: str) -> None:
    good, bad = (os.fsdecode(os.fsencode(tmp_path / "images") + b"/\xff\xfe" + end) for end in (b".png", b"2.png"))
    save(tmp_path / "images" / "a.png")
    save(Path(good))
    Path(bad).write_bytes(b"broken")
    output = run(tmp_path / "images", tmp_path / "out", f"{service.url}/sdxl", format, "--flip", status=1)
    assert "2 encoded, 0 already stored, 1 failed" in output
    assert list(failures(tmp_path / "out")) == [Path(bad).name]
    Path(bad).unlink()
    assert "0 encoded, 2 already stored" in run(
        tmp_path / "images", tmp_path / "out", f"{service.url}/sdxl", format, "--flip"
    )


def test_long_names(service: Service, tmp_path: Path) -> None:
    """Test that shards accept names of any length. An image with a too long file name is listed as failed."""
    longest, japanese = "n" * 251, "絵" * 32
    for name in (longest, japanese, "a"):
        save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{japanese}.txt").write_text("caption")
    assert "3 encoded" in run(tmp_path / "images", tmp_path / "shards", f"{service.url}/sdxl", "webdataset")
    shard = members(tmp_path / "shards" / "shard-000000.tar")
    assert sorted(name for name in shard if name.endswith(".json")) == ["a.json", f"{longest}.json", f"{japanese}.json"]
    assert shard[f"{japanese}.txt"] == b"caption"
    output = run(tmp_path / "images", tmp_path / "npz", f"{service.url}/sdxl", "kohya", status=1)
    assert "2 encoded, 0 already stored, 1 failed" in output
    assert "too long" in failures(tmp_path / "npz")[f"{longest}.png"]


def test_webdataset_reads_every_name(tmp_path: Path) -> None:
    """Read shards of unusual names by the loader of webdataset. Names that it would skip are listed."""
    names = ["a b.c.jpg", "x.y/ü.png", "__a__.png", "-.png", "line\nbreak.png", "more/__b__/c.png", "__c__/d.png"]
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / name)
    options = ["--format", "webdataset", "--resolution", "64", "--out", str(tmp_path / "out")]
    with sleeping_service() as service, pytest.raises(ValueError, match="1 images could not be encoded"):
        app(["latents", service.url, str(tmp_path / "images"), *options], standalone_mode=False)
    assert "webdataset skips" in failures(tmp_path / "out")["__c__/d.png"]
    samples = read_shards(str(tmp_path / "out" / "shard-000000.tar"))
    assert {sample["json"]["file"] for sample in samples} == set(names[:-1])


def test_special_files(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test a FIFO, which would block a reader."""
    save(tmp_path / "images" / "a.png")
    os.mkfifo(tmp_path / "images" / "fifo.png")
    (tmp_path / "images" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "images" / "gone.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "images" / "a.txt")
    with socket.socket(socket.AF_UNIX) as unix:
        monkeypatch.chdir(tmp_path / "images")
        unix.bind("socket.png")  # relative, because the path of a socket may have 107 bytes
    output = run(tmp_path / "images", tmp_path / "out", f"{service.url}/sdxl", "webdataset", status=1)
    assert "1 encoded, 0 already stored, 4 failed" in output
    listed = failures(tmp_path / "out")
    for name in ("fifo.png", "zero.png", "socket.png"):
        assert listed[name] == "it is not a file, but a FIFO, a socket or a device"
    assert "No such file" in listed["gone.png"]


def test_several_resolutions_in_one_folder(service: Service, tmp_path: Path) -> None:
    """Test that several resolutions are allowed if the keys in a `.npz`, or the names of the files, differ."""
    folder = tmp_path / "images"
    save(folder / "a.png", (300, 200))
    for resolution in ("128", "256", "256"):
        output = run(folder, folder, f"{service.url}/flux", "kohya", "--flip", "--resolution", resolution)
    assert "0 encoded, 1 already stored" in output
    with np.load(folder / "a_0300x0200_flux.npz") as file:
        kinds = ("latents", "latents_flipped", "original_size", "crop_ltrb")
        assert sorted(file.files) == sorted(f"{kind}_{size}" for kind in kinds for size in ("16x16", "32x32"))
        assert file["latents_16x16"].shape == (16, 16, 16)
        assert file["latents_32x32"].shape == (16, 32, 32)
    for resolution in ("128", "256"):
        run(folder, folder, f"{service.url}/flux", "ai-toolkit", "--resolution", resolution)
    shapes = set()
    for path in (folder / "_latent_cache").iterdir():
        with safe_open(path, "pt") as latents:
            shapes.add(tuple(latents.get_tensor("latent").shape))
    assert shapes == {(16, 16, 16), (16, 24, 40)}
    run(folder, folder, f"{service.url}/sdxl", "kohya")
    output = run(folder, folder, f"{service.url}/sdxl", "kohya", "--resolution", "256", status=1)
    assert "made with resolution=[128, 128]" in output


def test_a_failed_image_is_retried(service: Service, tmp_path: Path) -> None:
    """Test that the image is retried, also after a shard was written without it."""
    save(tmp_path / "images" / "a.png")
    whole = save(tmp_path / "images" / "b.png", (200, 150)).read_bytes()
    (tmp_path / "images" / "b.png").write_bytes(whole[:-40])
    for encoded, stored in ((1, 0), (0, 1)):
        output = run(tmp_path / "images", tmp_path / "out", f"{service.url}/sdxl", "webdataset", status=1)
        assert f"{encoded} encoded, {stored} already stored, 1 failed" in output
    (tmp_path / "images" / "b.png").write_bytes(whole)
    assert "1 encoded, 1 already stored" in run(
        tmp_path / "images", tmp_path / "out", f"{service.url}/sdxl", "webdataset"
    )
    assert list(members(tmp_path / "out" / "shard-000001.tar")) == ["b.moments.npy", "b.json"]


@pytest.mark.parametrize("kind", ["16 bits", "alpha", "palette", "turned", "transparent gray of 16 bits"])
def test_webdataset_reads_an_image_as_the_endpoint_does(service: Service, tmp_path: Path, kind: str) -> None:
    """Compare its moments with `/encode` of the file itself. The file has the size of a bucket."""
    y, x = np.mgrid[:128, :128]
    gray = (x * 400 + y * 100).astype(np.uint16)
    gray[32:64] = 20000
    image, options = Image.fromarray(gray), {}
    if kind == "alpha":
        image = Image.fromarray(np.stack([x, y, x + y, 255 - 2 * y], axis=-1).clip(0, 255).astype(np.uint8))
    elif kind == "palette":
        image, options = Image.fromarray(gray // 256).convert("L").convert("P"), {"transparency": 40}
    elif kind == "turned":
        image = Image.fromarray((x + y).astype(np.uint8))
        options = {"exif": Image.Exif()}
        options["exif"][0x0112] = 6
    elif kind.startswith("transparent"):
        options = {"transparency": 20000}
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "a.png", **options)
    run(tmp_path / "images", tmp_path / "out", f"{service.url}/sdxl", "webdataset")
    ours = np.load(io.BytesIO(members(tmp_path / "out" / "shard-000000.tar")["a.moments.npy"]))
    if kind.startswith("transparent"):  # the expected pixels: white, and the rest in 8 bits
        pixels = np.where(gray == 20000, 255, (gray.astype(int) + 128) // 257).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    response = requests.post(
        f"{service.url}/sdxl/encode",
        data=(tmp_path / "images" / "a.png").read_bytes(),
        params={"sample_mode": "moments", "do_scaling": False},
        timeout=60,
    )
    torch.testing.assert_close(torch.from_numpy(ours), as_tensor(response)[0].float(), atol=1e-5, rtol=1e-5)
