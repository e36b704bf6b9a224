"""Tests of sentences in SECURITY.md that no other file tests."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from handlers import MODELS
from handlers.serving.errors import RequestError
from handlers.serving.limits import Limits
from handlers.serving.media.mp4 import find_video, read_video
from handlers.serving.media.payload import read_image
from handlers.serving.media.request import Parameters
from handlers.serving.settings import Settings
from handlers.serving.vae.vae import VAE
from scripts.local_server import ROOT, clean_environment, free_port, wait_until_healthy
from tests.support import forked
from traffic.mp4_files import make_frames, video

LIMITS = Limits()


def test_each_listed_test_exists() -> None:
    _, table = (ROOT / "SECURITY.md").read_text().split("\n## Tests\n")
    files = re.findall(r"`(?:tests/\w+/|tests/)?(test_\w+\.py)`", table)
    assert len(files) > 5
    assert [file for file in files if not list((ROOT / "tests").rglob(file))] == []


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_pillow_gets_no_text_profile_or_exif(image_format: str) -> None:
    exif, text = Image.Exif(), PngInfo()
    exif[0x010E] = "a description"
    text.add_text("comment", "a text", zip=True)
    metadata = {"exif": exif, "icc_profile": b"profile" * 30, "comment": b"text", "xmp": b"<x/>", "pnginfo": text}
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, image_format, **metadata)
    known = {"exif", "icc_profile", "comment", "xmp"}
    assert known & Image.open(io.BytesIO(buffer.getvalue())).info.keys() >= {"exif", "icc_profile"}
    assert not known & read_image(buffer.getvalue(), LIMITS).info.keys()


def test_the_process_of_ffmpeg_has_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "secret")
    environments: list[dict[str, str]] = []

    def reserve(size: int) -> None:  # it is called before the process starts, and for each frame
        environments.extend(
            child.environ() for child in psutil.Process().children() if "frames.py" in " ".join(child.cmdline())
        )

    read_video(video(make_frames(2)), LIMITS, reserve)
    assert environments
    assert all("PATH" in environment for environment in environments)
    assert "secret" not in {value for environment in environments for value in environment.values()}


def test_ffmpeg_sees_only_the_first_video_track() -> None:
    file = video(make_frames(2), sound=3)
    assert file.count(b"trak") == 4
    assert b"".join(find_video(file, LIMITS).visible_bytes(file)).count(b"trak") == 1


@pytest.mark.parametrize(
    "name", sorted(Parameters.model_fields.keys() - {"height", "width"})
)  # wrong ones of these are ignored
def test_an_error_quotes_at_most_100_characters_of_a_parameter(name: str) -> None:
    with pytest.raises(RequestError) as refused:
        Parameters.parse({name: "~" * 5000})
    assert 90 < str(refused.value).count("~") <= 100


def test_code_in_a_checkpoint_does_not_run(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for file in checkpoint("sd-v1").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "code.Code"}, "_name_or_path": str(tmp_path)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("code.py", "__init__.py", "conftest.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    VAE.load(MODELS["sd-v1"], "", Settings(weights=str(tmp_path), fast=False), "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_only_this_machine_reaches_a_server_by_default(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    process = forked.start(["-m", "scripts.serve", "--model", "tiny", "--port", str(port)], log, clean_environment())
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        connections = psutil.Process(process.pid).net_connections()
        assert {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    finally:
        process.terminate()
        process.wait(timeout=30)
