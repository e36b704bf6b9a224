"""Tests of `remote-vae latents` for clips of videos, against a service that sleeps and against local encoding."""

from __future__ import annotations

import io
import json
import tarfile
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
from remote_vae.latents.format import ImageFile
from remote_vae.latents.musubi import MusubiVideos
from remote_vae.latents.run import Run
from remote_vae.latents.storage import LocalFolder
from remote_vae.latents.videos import Sampling, read_clips
from tests.remote_vae.test_latents import failures, run
from tests.support.sleeping_service import CONFIG, sleeping_service
from tests.support.small_service import Service


def save_video(path: Path, count: int, size: tuple[int, int] = (64, 48)) -> Path:
    """Save a video of so many frames, which differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size[1], : size[0]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("vp9" if path.suffix == ".webm" else "mpeg4", rate=24)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
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
    """Encode clips of videos to shards. A second run encodes only clips that are not in them."""
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
    with tarfile.open(out / "shard-000000.tar") as archive:
        names = [f"{key}.{end}" for key in ("a_00000-005", "a_00005-005") for end in ("moments.npy", "json", "txt")]
        assert archive.getnames() == [*names, "more/b_00000-005.moments.npy", "more/b_00000-005.json"]
        assert json.load(archive.extractfile("a_00005-005.json"))["clip"] == [5, 5]
        moments = np.load(io.BytesIO(archive.extractfile("a_00005-005.moments.npy").read()))
        assert moments.shape == (16, 2, 8, 8)
    with tarfile.open(out / "shard-000001.tar") as archive:
        assert archive.getnames() == ["a_00010-005.moments.npy", "a_00010-005.json", "a_00010-005.txt"]


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
    vae = service.model("wan-2.1")
    mean, std = (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    format = MusubiVideos("wan-2.1", (128, 128))
    placement = format.place((64, 48))
    with av.open(str(video)) as container:
        frames = [np.array(format.fit(frame.to_image(), placement)) for frame in container.decode(video=0)]
    pixels = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
    width, height = placement.bucket
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(names) == 4
    for start, count in ((0, 1), (11, 1), (0, 9), (3, 9)):
        latents = vae.encode(pixels[None, :, start : start + count]).latent_dist.mode()[0]
        name = f"a_{start:05}-{count:03}_{width:04}x{height:04}_wan.safetensors"
        with safe_open(tmp_path / "out" / name, "pt") as file:
            (key,) = file.keys()
            torch.testing.assert_close(file.get_tensor(key), (latents - mean) / std, atol=1e-4, rtol=1e-4)


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
    ],
)
def test_wrong_options(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    arguments = ["latents", "--out", str(tmp_path / "out"), "--format", "musubi", *options]
    with sleeping_service(model="wan-2.1", kind="video") as service, pytest.raises(ValueError, match=message):
        app([*arguments, service.url, str(tmp_path)], standalone_mode=False)
