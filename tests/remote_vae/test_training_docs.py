"""Tests of docs/training.md: its table of models, its commands, and the options that its config lines name."""

from __future__ import annotations

import re
import shlex
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from remote_vae.cli import app
from remote_vae.latents.formats import FORMATS
from scripts.local_server import ROOT
from tests.remote_vae.test_simpletuner import write_metadata
from tests.remote_vae.test_videos import save_video
from tests.support import forked
from tests.support.shards import shards_left_open
from tests.support.sleeping_service import CONFIG, sleeping_service

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "training.md").read_text()
COMMANDS = re.findall(r"^ *\$ (remote-vae latents.*)", PAGE, re.MULTILINE)


def test_the_table_has_every_model_of_every_trainer() -> None:
    rows = [line.strip("| ").split("|") for line in PAGE.splitlines() if line.startswith("| ")]
    (head, *body) = [[cell.strip() for cell in row] for row in rows]
    for column, name in enumerate(head[1:], start=1):
        listed = {
            (arch, row[0].strip("`")) for row in body for arch in re.findall(r"`(\S+?)`", (row + [""] * 5)[column])
        }
        rows_of_code = FORMATS[name.strip("`")].architectures.items()
        assert listed == {(arch, architecture.vae) for arch, architecture in rows_of_code}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each command of the page, with services that sleep as its endpoints, and with URLs in memory."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for index in range(9):
        Image.new("RGB", (64, 64)).save(f"images/{index}.png")
    write_metadata(tmp_path / "images", {f"{index}.png": entry(64, 64) for index in range(9)}, id="my-images")
    save_video(Path("videos/a.mp4"), 30)
    write_metadata(tmp_path / "videos", {"a.mp4": entry(64, 48)}, id="my-videos", video={"num_frames": 25})
    Path("set").mkdir()
    with tarfile.open("set/00042.tar", "w") as archive:
        archive.add("images/0.png", "0.png")
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for folder in ("datasets/<you>/images", "bucket/images"):
        memory.put("images", f"/{folder}", recursive=True)
        memory.put("set/00042.tar", f"/{folder}/00042.tar")
    command = re.sub("hf://|s3://", "memory://", command)
    arguments = shlex.split(command)[1:]
    arch = arguments[arguments.index("--arch") + 1] if "--arch" in arguments else "sdxl"
    format = FORMATS[arguments[arguments.index("--format") + 1]]
    config: dict[str, Any] = {"model": format.architectures[arch].vae if format.architectures else "sdxl"}
    if "--frames" in arguments:
        config |= {"kind": "video", "pixels": {**CONFIG["pixels"], "frame_counts": [1, 5, 9]}}
    if "--resolution" in arguments:
        arguments[arguments.index("--resolution") + 1] = "64"
    with sleeping_service(**config) as one, sleeping_service(**config) as two, sleeping_service(**config) as three:
        urls = {"URL": one.url, "URL_2": two.url, "URL_3": three.url}
        app([urls.get(argument, argument) for argument in arguments], standalone_mode=False)
    fs, out = fsspec.core.url_to_fs(arguments[arguments.index("--out") + 1])
    assert [name for name in fs.find(out) if name.endswith((".npz", ".safetensors", ".pt", ".tar"))]


def entry(width: int, height: int) -> dict[str, list[int]]:
    """Return SimpleTuner's metadata of an image or video that keeps its size."""
    sizes = {key: [width, height] for key in ("original_size", "intermediary_size", "target_size")}
    return {**sizes, "crop_coordinates": [0, 0]}


def test_the_example_of_slurm_names_a_shard() -> None:
    (line,) = re.findall(r"--array=(\S+) --wrap '(.+)'", PAGE)
    assert line[0] == "1-8"
    assert line[1].endswith("--shard $SLURM_ARRAY_TASK_ID/8")


def test_the_example_of_webdataset_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a shard by the page's own loop, with the real loader."""
    (example,) = re.findall(r"```python\n(import webdataset.*?)```", PAGE, re.DOTALL)
    (command,) = re.findall(r"remote-vae latents URL images (--out shards .*)", PAGE)
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Image.new("RGB", (64, 64)).save("images/a.png")
    Path("images/a.txt").write_text("a caption")
    with sleeping_service() as service:
        app(["latents", service.url, "images", *shlex.split(command)], standalone_mode=False)
    found: dict[str, Any] = {}
    with shards_left_open():
        exec(example.replace("000041", "000000"), found)
        result = found["latents"].shape, found["caption"]
        found.clear()
    assert result == ((4, 128, 128), "a caption")


def test_the_script_of_a_job_runs(tmp_path: Path) -> None:
    """Run encode.py with the arguments that the page gives it."""
    (script,) = re.findall(r"```python\n(# encode.py.*?)```", PAGE, re.DOTALL)
    (job,) = re.findall(r"hf jobs uv run .*?\n  done", PAGE, re.DOTALL)
    _, _, arguments = job.removesuffix("done").replace("\\\n", " ").partition("encode.py ")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with sleeping_service() as service:
        places = {"URL": service.url, "/images": str(tmp_path), "/latents": str(tmp_path / "out"), "$i/8": "1/1"}
        status, _, errors = forked.run("-c", script, *(places.get(each, each) for each in shlex.split(arguments)))
    assert status == 0, errors
    assert (tmp_path / "out" / "shard-000000.tar").is_file()
