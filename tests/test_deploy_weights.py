"""Tests of WEIGHTS: a user's own files and repositories, checkpoints in several files, and wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from handlers import MODELS
from tests.support.deploy_runner import NAMESPACE, Runner, deploy, hub
from tests.support.hub_server import Hub, Repo

__all__ = ["deploy", "hub"]  # fixtures

CONFIG, ONE, INDEX = (
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
SHARDS = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
IMAGE = "ghcr.io/someone/remote-vae:0.1.0-cuda"


def config(vae_class: str, **entries: int) -> bytes:
    return json.dumps({"_class_name": vae_class, **entries}).encode()


def first_layer(channels: int, name: str = "decoder.conv_in.weight") -> bytes:
    """Return a .safetensors file with the first weights of a decoder alone."""
    return save({name: np.zeros((2, channels, 3, 3), np.float32)})


def sharded(vae_class: str) -> dict[str, bytes]:
    index = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}).encode()
    return {CONFIG: config(vae_class), INDEX: index, **{name: name.encode() for name in SHARDS}}


FLUX = {CONFIG: config("AutoencoderKL", latent_channels=16), ONE: b"weights"}
FILE = first_layer(16)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def deployed(hub: Hub, model: str) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return the files of weights in the endpoint's repository, and its `endpoint.json`."""
    files = hub.repos[f"{NAMESPACE}/remote-vae-{model}"].files
    weights = {path.removeprefix("vae/"): content for path, content in files.items() if path.startswith("vae/")}
    return weights, json.loads(files["endpoint.json"])


@pytest.mark.parametrize(
    ("model", "files", "weights", "expected"),
    [
        ("flux", FLUX, "", FLUX),
        ("flux", sharded("AutoencoderKL"), "", sharded("AutoencoderKL")),
        ("flux", {"anime.safetensors": FILE}, "anime.safetensors", {"vae.safetensors": FILE}),
        (
            "taeh3",
            {"tae.safetensors": first_layer(24, "decoder.1.weight")},
            "tae.safetensors",
            {"taeh3.safetensors": first_layer(24, "decoder.1.weight")},
        ),
    ],
    ids=["folder", "folder of several files", "file", "file of a model without a checkpoint"],
)
def test_weights_of_this_machine(
    hub: Hub,
    deploy: Runner,
    tmp_path: Path,
    model: str,
    files: dict[str, bytes],
    weights: str,
    expected: dict[str, bytes],
) -> None:
    path = str(write(tmp_path / "own", files) / weights)
    result = deploy("deploy", "--model", model, "--weights", path)
    assert result.status == 0, result.err
    stored, record = deployed(hub, model)
    assert stored == expected
    assert record["checkpoint"] == ("a local file" if weights else "a local folder")
    assert "unchanged at commit" in deploy("deploy", "--model", model, "--weights", path).out


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lab/anime:vae", FLUX),
        ("lab/anime:vae@{commit}", FLUX),
        ("lab/anime:several", sharded("AutoencoderKL")),
        ("lab/anime:old/anime.safetensors", {"vae.safetensors": FILE}),
    ],
    ids=["subfolder", "revision", "several files", "file"],
)
def test_weights_of_a_repository(hub: Hub, deploy: Runner, name: str, expected: dict[str, bytes]) -> None:
    repo = hub.repos["lab/anime"] = Repo()
    files = {f"several/{name}": content for name, content in sharded("AutoencoderKL").items()}
    files |= {f"vae/{name}": content for name, content in FLUX.items()} | {"old/anime.safetensors": FILE}
    commit = repo.commit(files)
    if "@" in name:
        repo.commit({**files, f"vae/{ONE}": b"newer"})
    result = deploy("deploy", "--model", "flux", "--weights", name.format(commit=commit))
    assert result.status == 0, result.err
    stored, record = deployed(hub, "flux")
    assert stored == expected
    assert (record["checkpoint"], record["revision"]) == ("lab/anime", commit)
    assert "weights from `lab/anime` at commit" in hub.repos[f"{NAMESPACE}/remote-vae-flux"].files["README.md"].decode()


def test_a_checkpoint_in_several_files(hub: Hub, deploy: Runner) -> None:
    files = sharded("AutoencoderKLMiniMaxH3")
    repo = hub.repos[MODELS["minimax-h3"].checkpoint] = Repo()
    repo.commit({f"vae/{name}": content for name, content in files.items()} | {f"vae/{ONE}.md": b"about"})
    assert deploy("deploy", "--model", "minimax-h3", "--image", IMAGE).status == 0
    assert deployed(hub, "minimax-h3")[0] == files


@pytest.mark.parametrize(
    ("files", "weights", "message"),
    [
        (
            {CONFIG: config("AutoencoderKLWan", z_dim=48), ONE: b""},
            "",
            "is an AutoencoderKLWan, and flux needs an AutoencoderKL; they fit MODEL=wan-2.2",
        ),
        (
            {CONFIG: config("AutoencoderKL", latent_channels=4), ONE: b""},
            "",
            "has 4 latent channels, and flux has 16; they fit MODEL=sd-v1 or sdxl or playground-v2.5",
        ),
        (
            {"x.safetensors": first_layer(4)},
            "x.safetensors",
            "x.safetensors has 4 latent channels, and flux has 16; they fit MODEL=sd-v1 or sdxl or playground-v2.5",
        ),
        (
            {"x.safetensors": first_layer(16, "decoder.1.weight")},
            "x.safetensors",
            "x.safetensors has no decoder.conv_in.weight and no decoder.conv_in.conv.weight and no "
            "decoder.conv1.weight: flux needs an AutoencoderKL",
        ),
        ({"x.safetensors": b"no weights"}, "x.safetensors", "x.safetensors is no .safetensors file"),
        ({"x.safetensors": b"\xff" * 9}, "x.safetensors", "x.safetensors is no .safetensors file"),
        (
            {name: content for name, content in sharded("AutoencoderKL").items() if name != SHARDS[1]},
            "",
            f"has no {SHARDS[1]}",
        ),
        (
            {**sharded("AutoencoderKL"), INDEX: b'{"weight_map": {"a": "../../secret.safetensors"}}'},
            "",
            "is no index of .safetensors files beside it: it names '../../secret.safetensors'",
        ),
    ],
    ids=["class", "channels", "file's channels", "file's class", "no file", "header", "missing", "elsewhere"],
)
def test_wrong_weights_of_this_machine(
    hub: Hub, deploy: Runner, tmp_path: Path, files: dict[str, bytes], weights: str, message: str
) -> None:
    path = write(tmp_path / "own", files) / weights
    result = deploy("deploy", "--model", "flux", "--weights", str(path))
    assert (result.status, len(result.lines)) == (1, 1)
    assert result.lines[0].startswith("error: WEIGHTS")
    assert message in result.lines[0]
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lab/wan", "WEIGHTS=lab/wan/config.json is an AutoencoderKLWan, and flux needs an AutoencoderKL; they fit "),
        ("lab/wan:vae", "lab/wan has no vae/config.json and no vae/diffusion_pytorch_model.safetensors at commit "),
        ("lab/none", "lab/none is not on the Hub, or this token may not see it"),
    ],
)
def test_wrong_weights_of_a_repository(hub: Hub, deploy: Runner, name: str, message: str) -> None:
    hub.repos["lab/wan"] = Repo()
    hub.repos["lab/wan"].commit({CONFIG: config("AutoencoderKLWan", z_dim=16), ONE: b""})
    result = deploy("deploy", "--model", "flux", "--weights", name)
    assert result.status == 1
    assert message in result.lines[-1]
    assert f"{NAMESPACE}/remote-vae-flux" not in hub.repos


def test_a_revision_is_named_once(deploy: Runner) -> None:
    result = deploy("deploy", "--model", "flux", "--weights", "lab/vae@main", "--revision", "main")
    assert result.lines == ["error: WEIGHTS and REVISION both name a revision: name one"]


def test_a_dry_run_needs_no_network(hub: Hub, deploy: Runner) -> None:
    plan = ("deploy", "--model", "flux", "--dry-run", "--weights")
    assert "Weights are copied on the Hub from lab/anime; the model's license" in deploy(*plan, "lab/anime:vae").out
    assert "vae/vae.safetensors" in deploy(*plan, "lab/anime:old/anime.safetensors").out
    assert hub.requests == []
