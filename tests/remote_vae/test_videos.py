"""Tests of `remote-vae latents` for clips of videos, against a service that sleeps and against local encoding."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open

from remote_vae import Client
from remote_vae.cli import app
from remote_vae.latents.ai_toolkit import AIToolkitVideos
from remote_vae.latents.format import Format, ImageFile
from remote_vae.latents.musubi import MusubiVideos
from remote_vae.latents.run import Run
from remote_vae.latents.storage import LocalFolder
from remote_vae.latents.videos import Sampling, read_clips
from tests.remote_vae.test_latents import failures, run
from tests.support.shards import read_shards
from tests.support.sleeping_service import CONFIG, sleeping_service
from tests.support.small_service import Service

pytestmark = pytest.mark.slow


def save_video(path: Path, count: int, size: tuple[int, int] = (64, 48), codec: str | None = None) -> Path:
    """Save a video of so many frames, which differ. The codec "ffv1" keeps every pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size[1], : size[0]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec or ("vp9" if path.suffix == ".webm" else "mpeg4"), rate=24)
        stream.width, stream.height = size
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        for index in range(count):
            pixels = np.stack([(x * 4 + index * 9) % 256, y * 5 % 256, x * 0 + index * 11 % 256], axis=-1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.astype(np.uint8), "rgb24")))
        container.mux(stream.encode())
    return path


def encode(folder: Path, out: Path, sampling: Sampling, arch: str = "wan") -> Run:
    with sleeping_service(model="wan-2.1", kind="video") as service:
        client = Client(service.url, token="")
        format = MusubiVideos("wan-2.1", (96, 64), arch=arch, sampling=sampling)
        run = Run(client, client.config(), folder, out, format, seed=0, workers=2)
        run.encode(Console(file=io.StringIO()))
        run.requests = service.served  # type: ignore[attr-defined]
        return run


def test_videos_are_continued(tmp_path: Path) -> None:
    """Encode three types of files. Only clips that are missing are encoded again; a broken video is listed."""
    folder, out = tmp_path / "videos", tmp_path / "out"
    for name in ("a.mp4", "b.mov", "c.webm"):
        save_video(folder / name, 20)
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:2000])
    save_video(folder / "short.mp4", 3)
    sampling = Sampling((5, 9), "chunk")
    run = encode(folder, out, sampling)
    assert (run.encoded, run.failures.count, run.requests) == (3, 2, 18)
    listed = failures(out)
    assert sorted(listed) == ["cut.mp4", "short.mp4"]
    assert listed["short.mp4"] == "the video has 3 frames, too few for clips of 5"
    files = sorted(path.name for path in out.glob("a_*"))
    assert files == [
        f"a_{start:05}-{count:03}_0080x0064_wan.safetensors"
        for start, count in ((0, 5), (0, 9), (5, 5), (9, 9), (10, 5), (15, 5))
    ]
    with safe_open(out / files[1], "pt") as file:
        assert list(file.keys()) == ["latents_3x8x10_float32"]
        assert file.metadata()["frame_count"] == "9"
    (out / files[2]).unlink()
    run = encode(folder, out, sampling)
    assert (run.encoded, run.already_stored, run.failures.count, run.requests) == (1, 2, 2, 1)
    assert sorted(path.name for path in out.glob("a_*")) == files


def test_videos_of_ai_toolkit_are_continued(tmp_path: Path) -> None:
    """Encode videos in a folder and in a shard. Frames lie evenly from the first to the last."""
    folder = tmp_path / "videos"
    for name, count in {"a.mp4": 20, "b.mov": 3, "c.webm": 9}.items():
        save_video(folder / name, count)
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:2000])
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(folder / "a.mp4", "a.mp4")
    format = AIToolkitVideos("wan-2.1", (64, 64), arch="wan21", frames=5)
    with sleeping_service(model="wan-2.1", kind="video") as service:
        client = Client(service.url, token="")
        for source, encoded, stored in ((folder, 3, 0), (folder, 0, 3), (tmp_path / "set.tar", 1, 0)):
            run = Run(client, client.config(), source, tmp_path / "out", format, seed=0, workers=2)
            run.encode(Console(file=io.StringIO()))
            assert (run.encoded, run.already_stored) == (encoded, stored)
            assert run.failures.count == (source == folder)
    files = sorted(path.relative_to(tmp_path / "out").parent for path in (tmp_path / "out").rglob("*.safetensors"))
    assert files == [Path("_latent_cache")] * 3 + [Path("set", "_latent_cache")]
    local = LocalFolder(folder)
    for name, indices in {"a.mp4": [0, 5, 10, 14, 19], "b.mov": [0, 0, 1, 2, 2]}.items():
        image = ImageFile(local, Path(name), format.place((64, 48)))
        ((part, pixels),) = format.parts(image, local)
        assert part.clip == (0, 5)
        assert pixels.shape == (5, 48, 64, 3)
        with av.open(str(folder / name)) as container:
            blue = [frame.to_ndarray(format="rgb24")[..., 2].mean() for frame in container.decode(video=0)]
        np.testing.assert_allclose(pixels[..., 2].mean(axis=(1, 2)), [blue[index] for index in indices], atol=3)


def test_videos_in_shards_are_continued(tmp_path: Path) -> None:
    """Encode clips of videos to shards, and read them. A second run encodes only clips that are not in them."""
    folder, out = tmp_path / "videos", tmp_path / "out"
    for name, count in {"a.mp4": 12, "more/b.mov": 5}.items():
        save_video(folder / name, count)
    (folder / "a.txt").write_text("a caption")
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:300])
    pixels = {**CONFIG["pixels"], "frame_counts": [1, 5, 9]}
    with sleeping_service(model="wan-2.1", kind="video", pixels=pixels) as service:

        def encode_clips() -> int:
            before = service.served
            options = ["--format", "webdataset", "--frames", "5", "--frame-extraction", "chunk", "--resolution", "64"]
            with pytest.raises(ValueError, match="1 images could not be encoded"):
                app(["latents", service.url, str(folder), "--out", str(out), *options], standalone_mode=False)
            return service.served - before

        assert [encode_clips(), encode_clips()] == [3, 0]
        save_video(folder / "a.mp4", 17)
        assert encode_clips() == 1
    shards = [str(out / f"shard-00000{index}.tar") for index in (0, 1)]
    samples = {sample["__key__"]: sample for sample in read_shards(*shards)}
    assert [*samples] == ["a_00000-005", "a_00005-005", "more/b_00000-005", "a_00010-005"]
    for key, sample in samples.items():
        assert sample.get("txt") == (None if key.startswith("more") else "a caption")
        assert sample["json"]["clip"] == [int(key[-9:-4]), 5]
        assert sample["moments.npy"].shape == (16, 2, 8, 8)
        assert sample["__url__"] == shards[key == "a_00010-005"]


def test_frames_are_held_only_as_long_as_a_clip_needs_them() -> None:
    """Read two clips that overlap from an endless video."""
    alive: set[int] = set()

    class Frame:
        def __init__(self, index: int) -> None:
            self.index = index
            alive.add(index)

        def __del__(self) -> None:
            alive.discard(self.index)

        def to_image(self) -> Image.Image:
            return Image.new("RGB", (8, 8), (self.index % 256, 0, 0))

    def frames() -> Any:
        index = 0
        while True:
            assert len(alive) < 5
            yield Frame(index)
            index += 1

    clips = dict(read_clips(frames(), [(300, 9), (2, 5), (4, 5)], lambda image: image))
    assert list(clips) == [(2, 5), (4, 5), (300, 9)]
    assert clips[4, 5][:, 0, 0, 0].tolist() == [4, 5, 6, 7, 8]
    assert clips[300, 9][:, 0, 0, 0].tolist() == [index % 256 for index in range(300, 309)]


@torch.no_grad()
def test_clips_equal_local_encoding(service: Service, tmp_path: Path) -> None:
    video = save_video(tmp_path / "videos" / "a.mp4", 12)
    options = ("--frames", "1,9", "--frame-extraction", "uniform", "--frame-sample", "2")
    assert "1 encoded" in run(tmp_path / "videos", tmp_path / "out", f"{service.url}/wan-2.1", "musubi", *options)
    format = MusubiVideos("wan-2.1", (128, 128))
    pixels = read_pixels(video, format)
    width, height = format.place((64, 48)).bucket
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(names) == 4
    for start, count in ((0, 1), (11, 1), (0, 9), (3, 9)):
        latents = encode_locally(service.model("wan-2.1"), pixels[:, start : start + count])
        name = f"a_{start:05}-{count:03}_{width:04}x{height:04}_wan.safetensors"
        with safe_open(tmp_path / "out" / name, "pt") as file:
            (key,) = file.keys()
            torch.testing.assert_close(file.get_tensor(key), latents, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_first_frames_equal_local_encoding(service: Service, tmp_path: Path) -> None:
    """Encode clips with their first frames for Wan 2.2: the 14B model in musubi-tuner, the 5B model in ai-toolkit."""
    video = save_video(tmp_path / "videos" / "a.mp4", 9)
    options = ("--arch", "wan", "--frames", "1,5", "--i2v")
    assert "1 encoded" in run(video.parent, tmp_path / "out", f"{service.url}/wan-2.1", "musubi", *options)
    pixels = read_pixels(video, MusubiVideos("wan-2.1", (128, 128), arch="wan"))[:, :5]
    pixels[:, 1:] = 0
    (name,) = (tmp_path / "out").glob("*-005_*.safetensors")
    with safe_open(name, "pt") as file:
        (key,) = (key for key in file.keys() if key.startswith("latents_image"))  # noqa: SIM118
        latents = file.get_tensor(key)
    assert latents[:4, 0].unique().tolist() == [1]
    assert latents[:4, 1:].unique().tolist() == [0]
    theirs = encode_locally(service.model("wan-2.1"), pixels)
    torch.testing.assert_close(latents[4:], theirs, atol=1e-4, rtol=1e-4)

    options = ("--arch", "wan22_5b", "--frames", "5", "--i2v")
    assert "1 encoded" in run(video.parent, tmp_path, f"{service.url}/wan-2.2", "ai-toolkit", *options)
    (name,) = (tmp_path / "_latent_cache").glob("*.safetensors")
    with safe_open(name, "pt") as file:
        latents = file.get_tensor("first_frame_latent")
    pixels = read_pixels(video, AIToolkitVideos("wan-2.2", (128, 128), arch="wan22_5b", frames=5))[:, :1]
    noise = torch.Generator().manual_seed(zlib.crc32(b"a.mp4 (0, 5)"))
    theirs = encode_locally(service.model("wan-2.2"), pixels, noise)
    torch.testing.assert_close(latents, theirs, atol=1e-4, rtol=1e-4)


def test_clips_with_and_without_first_frames_are_not_mixed(tmp_path: Path) -> None:
    """Continue a run of a version that had no --i2v, with and without it."""
    save_video(tmp_path / "videos" / "a.mp4", 5)
    options = [str(tmp_path / "videos"), "--out", str(tmp_path), "--format", "musubi", "--frames", "5"]
    with sleeping_service(model="wan-2.1", kind="video") as service:
        app(["latents", service.url, *options], standalone_mode=False)
        file = tmp_path / ".remote-vae" / "musubi-tuner-wan-videos.json"
        settings = json.loads(file.read_text())
        assert settings.pop("i2v") is False
        file.write_text(json.dumps(settings))
        app(["latents", service.url, *options], standalone_mode=False)
        with pytest.raises(ValueError, match="made with i2v=False"):
            app(["latents", service.url, *options, "--i2v"], standalone_mode=False)
        assert service.served == 1


def read_pixels(video: Path, format: Format) -> torch.Tensor:
    """Return all frames as a trainer resizes them [3, F, H, W], in [-1, 1]."""
    with av.open(str(video)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    pixels = np.stack([np.array(format.fit(frame, format.place(frame.size))) for frame in frames])
    return torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 127.5 - 1


def encode_locally(vae: Any, pixels: torch.Tensor, noise: torch.Generator | None = None) -> torch.Tensor:
    """Return the normalized latents of a video [C, F, h, w]: the mode, or a sample with this noise."""
    distribution = vae.encode(pixels[None]).latent_dist
    latents = distribution.sample(noise) if noise else distribution.mode()
    mean, std = (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (latents[0] - mean) / std


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--frames", "0"), "the options of frames must be above 0"),
        (("--frames", "9,a"), "--frames 9,a: expected lengths of clips"),
        (("--source-fps", "30"), "options of frames without --frames"),
        (("--frames", "9", "--frame-extraction", "tail"), "tail: expected one of head, chunk, slide, uniform, full"),
        (("--frames", "9", "--no-upscale"), "musubi-tuner always enlarges small videos"),
        (("--frames", "9", "--format", "kohya"), "--format kohya has no videos"),
        (("--frames", "9", "--format", "webdataset"), "wan-2.1 does not encode 1, 5, 9, ... frames"),
        (("--frames", "9", "--format", "ai-toolkit"), "add --arch: there are several models"),
        (("--frames", "8", "--format", "ai-toolkit", "--arch", "wan21"), "--frames 8: expected 5, 9, 13, ..."),
        (("--frames", "9,5", "--format", "ai-toolkit", "--arch", "wan21"), "takes one number of --frames"),
        (("--frames", "9", "--format", "ai-toolkit", "--arch", "wan21", "--source-fps", "30"), "no other option of"),
        (("--frames", "9", "--format", "ai-toolkit", "--arch", "wan21", "--flip"), "--flip: mirrored videos"),
        (("--frames", "9", "--format", "ai-toolkit", "--arch", "wan21", "--i2v"), "expected wan22_5b"),
        (("--i2v", "--format", "ai-toolkit"), "--i2v: expected --format musubi, or ai-toolkit with --frames"),
        (("--frames", "9", "--i2v", "--format", "webdataset"), "--i2v: expected --format musubi"),
    ],
)
def test_wrong_options(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    arguments = ["latents", "--out", str(tmp_path / "out"), "--format", "musubi", *options]
    with sleeping_service(model="wan-2.1", kind="video") as service, pytest.raises(ValueError, match=message):
        app([*arguments, service.url, str(tmp_path)], standalone_mode=False)
