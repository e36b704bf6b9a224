"""Tests of checkpoints that the Hub does not return: one line each, in both versions of huggingface_hub."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from scripts.local_server import free_port
from tests.support.hub_server import Hub, Repo, run_with_hub, running_hub

FETCH = """
import json, sys
from handlers.serving.vae import hub

hub.REACH_SECONDS = 1
for checkpoint in json.loads(sys.argv[1]):
    try:
        print(*sorted(path.name for path in hub.fetch(*checkpoint).iterdir()))
    except OSError as error:
        print(error)
"""
NOWHERE = "0" * 40
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PARTS = {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-1.safetensors"}
PART_FILES = {"part-1.safetensors": b"0", "part-2.safetensors": b"1"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path) as hub:
        for name, files in (
            ("lab/vae", {CONFIG: b"{}", WEIGHTS: b"0"}),
            ("lab/gated", {CONFIG: b"{}", WEIGHTS: b"0"}),
            ("lab/half", {f"vae/{CONFIG}": b"{}"}),
            ("lab/parts", {CONFIG: b"{}", INDEX: json.dumps({"weight_map": PARTS}).encode(), **PART_FILES}),
        ):
            hub.repos[name] = Repo(gated=name == "lab/gated")
            hub.repos[name].commit(files)
        yield hub


def fetch(
    url: str, cache: Path, *checkpoints: Sequence[str | None], code: str = FETCH, **environment: str
) -> list[str]:
    """Return the files of each checkpoint, or the error."""
    status, out, error = run_with_hub(url, cache, code, json.dumps(checkpoints), **environment)
    assert status == 0, error
    return out.splitlines()


@pytest.mark.slow
def test_missing_and_gated_checkpoints_have_an_error(hub: Hub, tmp_path: Path) -> None:
    page = "https://huggingface.co/lab"
    assert fetch(
        hub.url,
        tmp_path / "cache",
        ("lab/vae", None, None),
        ("lab/parts", None, None),
        ("lab/gated", None, None),
        ("lab/none", "vae", None),
        ("lab/half", None, None),
        ("lab/half", "vae", None),
        ("lab/vae", None, NOWHERE),
    ) == [
        f"{CONFIG} {WEIGHTS}",
        f"{CONFIG} {INDEX} part-1.safetensors part-2.safetensors",
        f"lab/gated is gated: accept its conditions on {page}/gated, then set HF_TOKEN to a token of that account",
        f"lab/none is not on the Hub, or the token in HF_TOKEN may not see it: {page}/none",
        f"lab/half has no {CONFIG}: {page}/half",
        f"lab/half has no vae/{WEIGHTS}: {page}/half",
        f"lab/vae has no files at revision {NOWHERE}: {page}/vae",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["nobody listens", "nobody responds", "offline"])
def test_an_unreachable_hub(hub: Hub, tmp_path: Path, reason: str) -> None:
    """Test an unreachable Hub. Cached files need no Hub."""
    cache, vae = tmp_path / "cache", ("lab/vae", None, None)
    assert fetch(hub.url, cache, vae) == [f"{CONFIG} {WEIGHTS}"]
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = free_port() if reason == "nobody listens" else silent.getsockname()[1]
        environment = {"HF_HUB_OFFLINE": "1"} if reason == "offline" else {}
        files, error = fetch(f"http://127.0.0.1:{port}", cache, vae, ("lab/none", "vae", None), **environment)
    assert files == f"{CONFIG} {WEIGHTS}"
    assert error.startswith("the Hub cannot be reached (")
    assert f"), and vae/{CONFIG} of lab/none is not in the cache; fix the network" in error


WEIGHTS_OF_A_USER = """
import json, sys
from handlers import MODELS
from handlers.serving.settings import Settings
from handlers.serving.vae.weights import load_model
import torch

for name in json.loads(sys.argv[1]):
    try:
        print(type(load_model(MODELS["sd-v1"], "", Settings(weights=name), torch.float32)).__name__)
    except OSError as error:
        print(error)
"""


@pytest.mark.slow
def test_weights_of_a_user(hub: Hub, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Test names of repositories, with a subfolder and a commit."""
    files = {name: (checkpoint("sd-v1") / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    hub.repos["lab/own"] = Repo()
    first = hub.repos["lab/own"].commit({f"deep/{name}": data for name, data in files.items()})
    hub.repos["lab/own"].commit({"README.md": b"moved"})
    names = (f"lab/own:deep@{first}", "lab/own:deep")
    assert fetch(hub.url, tmp_path / "cache", *names, code=WEIGHTS_OF_A_USER) == [
        "AutoencoderKL",
        f"lab/own has no deep/{CONFIG}: https://huggingface.co/lab/own",
    ]
