"""Tests of `remote-vae info`, `decode` and `encode`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from scripts.local_server import ROOT, free_port
from tests.support import forked
from tests.support.endpoint import same_video
from tests.support.faulty_proxy import faulty_proxy
from tests.support.small_service import Service

pytestmark = pytest.mark.slow

LATENTS = torch.randn((2, 4, 8, 12), generator=torch.Generator().manual_seed(0))


def remote_vae(*arguments: object, status: int = 0, **environment: str) -> tuple[str, str]:
    """Return standard output and standard error of the command."""
    actual, out, error = forked.run("-m", "remote_vae", *arguments, timeout=60, **{"COLUMNS": "300", **environment})
    assert actual == status, error
    assert "Traceback" not in error
    return out, error


def test_the_documented_commands_run_unchanged(service: Service, tmp_path: Path) -> None:
    """Run all but the player, and the proxy, which has its own tests."""
    readme = (ROOT / "remote_vae" / "README.md").read_text()
    commands = re.findall(r"^\$ remote-vae (.*?)(?: \| ffplay -)?\s*(?:#.*)?$", readme, re.MULTILINE)
    assert [command.split()[0] for command in commands] == [
        "info",
        "check",
        *3 * ["decode"],
        "encode",
        "latents",
        "proxy",
    ]
    (tmp_path / "images").mkdir()
    for image in ("photo.jpg", "images/a.png"):
        Image.effect_noise((96, 64), 50).convert("RGB").save(tmp_path / image)
    for command in commands[:-1]:
        video = ".mp4" in command or "--stream" in command
        latents = torch.randn(1, 16, 3, 8, 8) if video else LATENTS[:1]
        if "decode" in command:
            save_file({"latents": latents}, tmp_path / "latents.safetensors")
        url = f"{service.url}/{'wan-2.1' if video else 'tiny' if 'check' in command else 'sdxl'}"
        arguments = shlex.split(command.replace("URL", url))
        status, _, error = forked.run("-m", "remote_vae", *arguments, folder=tmp_path, PYTHONPATH=str(ROOT))
        assert status == 0, error
    assert {"image.png", "video.mp4", "latents.safetensors"} < {path.name for path in tmp_path.iterdir()}
    assert len(list((tmp_path / "images").glob("*.npz"))) == 1


def test_info(service: Service) -> None:
    out, _ = remote_vae("info", f"{service.url}/wan-2.1")
    for word in (
        "wan-2.1",
        "AutoencoderKLWan",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "BCFHW, 16 channels",
        "1, 5, 9, ...",
    ):
        assert word in out


def test_every_command_takes_the_url_first() -> None:
    for command in ("info", "check", "decode", "encode", "latents", "proxy"):
        out, _ = remote_vae(command, "--help")
        assert re.search(rf"Usage: .* {command} \[OPTIONS\] \{{?URL", out, re.IGNORECASE)
        assert ("--url" in out) == (command == "latents")  # which takes more endpoints with it


def test_the_error_of_a_wrong_port_is_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", LATENTS.numpy())
    url = f"http://127.0.0.1:{free_port()}"
    for command in (("info", url), ("check", url), ("decode", url, tmp_path / "z.npy", tmp_path / "o.png")):
        _, errors = remote_vae(*command, status=1)
        assert errors.strip().splitlines()[-1] == (
            f"error: {url} cannot be reached: connection refused, nothing listens there; is the port right, and is "
            "the server running?"
        )


@pytest.mark.parametrize("command", ["decode URL z.npy o.png", "encode URL p.png --out o.npy"])
def test_a_command_without_torch_has_a_clear_error(command: str, tmp_path: Path) -> None:
    """Hide torch, as in an environment with only the package."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    arguments = command.replace("URL", "http://127.0.0.1:9").split()
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "remote_vae", *arguments],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr == "error: this command needs torch, which is not installed: pip install torch\n"


def test_check(service: Service) -> None:
    out, _ = remote_vae("check", f"{service.url}/tiny")
    assert re.fullmatch(
        r"encode [\d.]+ s, decode [\d.]+ s: 256x256 pixels became latents \[1, 8, 64, 64\], "
        r"and these became the image, at [\d.]+ dB\n",
        out,
    )


@pytest.mark.parametrize(
    ("path", "error"),
    [
        (
            "/sdxl",
            r"/sdxl: the decoded image differs from the original: [\d.]+ dB, expected 15 dB or more; .*\?",
        ),
        ("/nothing", r"/nothing/encode: 404 .*"),
    ],
)
def test_check_with_a_wrong_endpoint(service: Service, path: str, error: str) -> None:
    out, errors = remote_vae("check", service.url + path, status=1)
    assert out == ""
    assert re.search(rf"error: http://\S+{error}$", errors.strip())


@pytest.mark.parametrize("url", ["http://a..b", "http://localhost:abc", "localhost:8000"])
def test_check_with_an_invalid_url(url: str) -> None:
    _, errors = remote_vae("check", url, status=1)
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("token", ["hf_secret\nx", "hf_secr\xe9t"])
def test_an_invalid_token_is_not_printed(token: str) -> None:
    _, errors = remote_vae("check", "http://127.0.0.1:9", "--token", token, status=1)
    assert "the token contains characters that no token has" in errors
    assert "secr" not in errors


def test_layers_with_transparency(service: Service, tmp_path: Path) -> None:
    """Test latents of ComfyUI, of an image and its two layers."""
    url, file = f"{service.url}/qwen-image-layered", tmp_path / "z.latent"
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    save_file({"latent_tensor": latents, "latent_format_version_0": torch.tensor([])}, file)
    _, error = remote_vae("decode", url, file, tmp_path / "o.png", "--layers", 2, status=1)
    assert "holds latents of ComfyUI, which are raw: add --raw" in error
    out, _ = remote_vae("decode", url, file, tmp_path / "o.png", "--layers", 2, "--raw")
    assert out.split() == [str(tmp_path / f"o-{index}.png") for index in range(2)]
    with Image.open(tmp_path / "o-1.png") as image, torch.no_grad():
        pixels = service.model("qwen-image-layered").decode(latents[:, :, 2:]).sample[0, :, 0]
        expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1
    _, error = remote_vae("decode", url, file, tmp_path / "o.jpg", "--layers", 2, "--raw", status=1)
    assert "JPEG has none: send background=white" in error
    options = ("--layers", 2, "--raw", "--background", "white")
    assert len(remote_vae("decode", url, file, tmp_path / "o.jpg", *options)[0].split()) == 2
    save_file({"latent_tensor": latents}, file)
    _, error = remote_vae("decode", url, file, tmp_path / "o.png", "--raw", status=1)
    assert "it is of an old ComfyUI, which scaled latents by 0.18215" in error


def test_comfyuis_range_is_the_models(service: Service, tmp_path: Path) -> None:
    """Test latents of ComfyUI that are normalized patches of FLUX.2, and a tiny VAE that takes no raw ones."""
    file, out = tmp_path / "z.latent", tmp_path / "o.png"
    patches = torch.randn(1, 128, 2, 3, generator=torch.Generator().manual_seed(0))
    save_file({"latent_tensor": patches, "latent_format_version_0": torch.tensor([])}, file)
    for key in ("flux2", "taef2"):
        expected = service.tensor(key, patches, "decode", do_scaling=True, output_type="pt", partial_postprocess=True)
        remote_vae("decode", f"{service.url}/{key}", file, out)
        with Image.open(out) as image:
            assert np.array_equal(np.asarray(image), expected[0].numpy())
        _, error = remote_vae("decode", f"{service.url}/{key}", file, out, "--raw", status=1)
        assert "which are normalized for this model: leave --raw out" in error
    _, error = remote_vae("decode", f"{service.url}/taesd", file, out, "--raw", status=1)
    assert "which are those of the large VAE: decode it with that" in error


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".pt"])
def test_decoding_a_batch(service: Service, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"latents{suffix}"
    if suffix == ".safetensors":
        save_file({"latents": LATENTS}, file)
    elif suffix == ".npy":
        np.save(file, LATENTS.numpy())
    else:
        torch.save(LATENTS, file)
    out, _ = remote_vae("decode", f"{service.url}/sd-v1", file, tmp_path / "out.png")
    assert out.split() == [str(tmp_path / f"out-{index}.png") for index in range(2)]
    vae = service.model("sd-v1")
    expected = vae.decode(LATENTS / vae.config.scaling_factor).sample
    for index, pixels in enumerate(expected):
        with Image.open(tmp_path / f"out-{index}.png") as image:
            ours = np.asarray(image).astype(int)
        assert np.abs(ours - ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()).max() <= 1


def test_encoding_and_decoding(service: Service, tmp_path: Path) -> None:
    url = f"{service.url}/sd-v1"
    for index in range(2):
        Image.radial_gradient("L").resize((96, 64)).rotate(90 * index).convert("RGB").save(tmp_path / f"{index}.png")
    both = [tmp_path / f"{index}.png" for index in range(2)]
    out, _ = remote_vae("encode", url, *both, "--out", tmp_path / "z.safetensors")
    assert out.strip() == f"{tmp_path / 'z.safetensors'} [2, 4, 8, 12]"
    remote_vae("encode", url, *both, "--out", tmp_path / "raw.npy", "--raw")
    scaled, raw = load_file(tmp_path / "z.safetensors")["latents"], torch.from_numpy(np.load(tmp_path / "raw.npy"))
    torch.testing.assert_close(scaled, raw * 0.18215, atol=1e-6, rtol=1e-6)
    remote_vae("encode", url, both[0], "--out", tmp_path / "m.npy", "--raw", "--sample-mode", "moments")
    assert np.load(tmp_path / "m.npy").shape == (1, 8, 8, 12)


def test_a_video(service: Service, tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", torch.randn(1, 16, 3, 8, 8).numpy())
    remote_vae("decode", f"{service.url}/wan-2.1", tmp_path / "z.npy", tmp_path / "v.mp4", "--fps", 8)
    with av.open(str(tmp_path / "v.mp4")) as video:
        assert (video.streams.video[0].frames, video.streams.video[0].average_rate) == (9, 8)
    out, _ = remote_vae("encode", f"{service.url}/wan-2.1", tmp_path / "v.mp4", "--out", tmp_path / "z.npy")
    assert out.endswith("[1, 16, 3, 8, 8]\n")


def test_a_streamed_video(service: Service, tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", torch.randn(1, 16, 3, 8, 8).numpy())
    url = f"{service.url}/wan-2.1"
    out, _ = remote_vae("decode", url, tmp_path / "z.npy", tmp_path / "v.mp4", "--stream")
    assert out.strip() == str(tmp_path / "v.mp4")
    with av.open(out.strip()) as video:
        assert len(list(video.decode(video=0))) == 9
    command = f"-m remote_vae decode {url} {tmp_path}/z.npy - --stream"
    process = forked.Process(command.split(), dict(os.environ), tmp_path / "piped", tmp_path / "errors")
    assert process.wait(timeout=60) == 0
    assert same_video((tmp_path / "piped").read_bytes(), (tmp_path / "v.mp4").read_bytes())


@pytest.mark.parametrize("is_hidden", [True, False])
def test_an_incomplete_video_leaves_no_file(service: Service, tmp_path: Path, is_hidden: bool) -> None:
    np.save(tmp_path / "z.npy", torch.randn(1, 16, 3, 8, 8).numpy())
    with faulty_proxy(f"{service.url}/wan-2.1") as faulty:
        faulty.drops = 1
        faulty.hides_drops = is_hidden
        _, error = remote_vae("decode", faulty.url, tmp_path / "z.npy", tmp_path / "v.mp4", "--stream", status=1)
    assert ("ended early" if is_hidden else "broke before the response was complete") in error
    assert [file.name for file in tmp_path.iterdir()] == ["z.npy"]


def test_packed_latents(service: Service, tmp_path: Path) -> None:
    save_file({"z": torch.randn(1, 24, 64)}, tmp_path / "z.safetensors")
    url = f"{service.url}/flux"
    size = ("--height", 64, "--width", 96)
    out, _ = remote_vae("decode", url, tmp_path / "z.safetensors", tmp_path / "p.webp", *size)
    with Image.open(out.strip()) as image:
        assert image.size == (96, 64)


def test_an_error_is_one_line(service: Service, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/touched",)

    save_file({"a": LATENTS, "b": LATENTS.clone()}, tmp_path / "two.safetensors")
    torch.save(Evil(), tmp_path / "evil.pt")
    np.save(tmp_path / "z.npy", LATENTS.numpy())
    (tmp_path / "text.safetensors").write_text("text")
    url = f"{service.url}/sd-v1"
    for file, out, message in (
        ("two.safetensors", "o.png", "holds a, b: expected one tensor"),
        ("evil.pt", "o.png", "cannot be read"),
        ("text.safetensors", "o.png", "cannot be read"),
        ("missing.npy", "o.png", "No such file or directory"),
        ("z.npy", "o.gif", "is no image or video: expected .png"),
        ("z.npy", "o.mp4", "'mp4' needs a video model"),
        ("z.npy", "-", "is no image or video: expected .png, .jpg, .jpeg, .webp, .mp4, or - with --stream"),
        ("z.txt", "o.png", "is no file of latents: expected"),
    ):
        out = out if out == "-" else tmp_path / out
        _, error = remote_vae("decode", url, tmp_path / file, out, status=1)
        assert message in error
        assert len(error.strip().splitlines()) <= 4, error
        assert not Path(out).exists()
    assert not (tmp_path / "touched").exists()


def test_no_token_is_printed(service: Service, tmp_path: Path) -> None:
    token = "hf_theTokenThatNobodyMaySee"
    with faulty_proxy(f"{service.url}/sd-v1") as faulty:
        faulty.token = token
        assert "sd-v1" in remote_vae("info", faulty.url, REMOTE_VAE_TOKEN=token)[0]
        printed = remote_vae("info", faulty.url, status=1, REMOTE_VAE_TOKEN=token + "x")
    assert token not in "".join(printed)
    assert "the token is not accepted" in printed[1]
