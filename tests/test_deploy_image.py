"""Tests of endpoints that run the container image of this project instead of the stock Inference Toolkit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from scripts.deployment.endpoint import IMAGE_SETTINGS
from scripts.local_server import ROOT
from tests.support.deploy_runner import NAMESPACE, Runner, deploy, hub, storage_client
from tests.support.hub_server import Hub

__all__ = ["deploy", "hub", "storage_client"]  # fixtures

IMAGE = "ghcr.io/ana/remote-vae:0.1.0-cuda"
FLUX = ("deploy", "--model", "flux", "--access", "public")
KEY = f"{NAMESPACE}/remote-vae-flux"


def test_the_plan_names_the_image(deploy: Runner) -> None:
    plan = deploy(*FLUX, "--image", IMAGE, "--dry-run", token=None)
    assert plan.status == 0
    assert f"container      {IMAGE}, which must be public and built for CUDA" in plan.out
    assert "Inference Toolkit" not in plan.out
    assert "handlers/" not in plan.out


@pytest.mark.parametrize("image", ["remote-vae", "remote-vae:1", "ghcr.io/ana/remote-vae", "ghcr.io/a b:1", "/a:1"])
def test_an_image_has_a_registry_and_a_tag(deploy: Runner, image: str) -> None:
    """Test names that a platform cannot find, or that mean another image tomorrow."""
    refused = deploy(*FLUX, "--image", image, "--dry-run", token=None)
    assert (refused.status, refused.out) == (1, "")
    assert refused.lines[-1].startswith(f"error: IMAGE={image} is not valid: name its registry and its tag or digest")


@pytest.mark.parametrize("image", [IMAGE, f"localhost:5000/remote-vae@sha256:{'0' * 64}"])
def test_an_endpoint_of_an_image(hub: Hub, deploy: Runner, image: str) -> None:
    """Test that all commands work as with the toolkit, and that only a new image is an update."""
    with_image = (*FLUX, "--image", image)
    assert deploy(*with_image).status == 0
    sent = hub.endpoints[KEY]["model"]
    assert sent["image"] == {"custom": {"url": image, "port": 8000, "healthRoute": "/health"}}
    assert (sent["framework"], sent["task"]) == ("pytorch", "custom")
    files = hub.repos[KEY].files
    assert {path.partition("/")[0] for path in files} == {"README.md", "endpoint.json", "vae"}
    assert json.loads(files["endpoint.json"])["model"] == "flux"

    hub.requests.clear()
    assert (deploy(*with_image).status, hub.changes()) == (0, [])
    for command in ("pause", "resume", "smoke", "endpoints"):
        named = () if command == "endpoints" else ("--model", "flux")
        assert deploy(command, *named).status == 0

    newer = image[:-1] + "1"
    updated = deploy(*FLUX, "--image", newer)
    assert f"updating remote-vae-flux: image {image} -> {newer}" in updated.out
    assert hub.endpoints[KEY]["model"]["image"]["custom"]["url"] == newer


def test_an_endpoint_moves_from_the_toolkit_to_an_image_and_not_back(hub: Hub, deploy: Runner) -> None:
    assert deploy(*FLUX).status == 0
    assert hub.endpoints[KEY]["model"]["image"] == {"huggingface": {}}
    moved = deploy(*FLUX, "--image", IMAGE)
    assert (moved.status, f"image None -> {IMAGE}" in moved.out) == (0, True)
    assert "handler.py" not in hub.repos[KEY].files

    hub.requests.clear()
    refused = deploy(*FLUX)
    assert (refused.status, hub.changes()) == (1, [])
    assert f"error: the endpoint remote-vae-flux runs IMAGE={IMAGE}: name an IMAGE again, or choose" in refused.err


def test_the_settings_are_those_of_the_image() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(r"PORT=(\d+)", dockerfile)[1] == str(IMAGE_SETTINGS["port"])
    assert IMAGE_SETTINGS["healthRoute"] in dockerfile
    assert "VAE_REPOSITORY=/repository" in dockerfile


@pytest.mark.slow
def test_the_image_serves_the_repository(hub: Hub, deploy: Runner) -> None:
    """Run the image's command on the deployed files, and send an image through it."""
    hub.serve_files()
    result = deploy("deploy", "--model", "tiny", "--access", "public", "--image", IMAGE)
    assert result.status == 0, result.err
    (process,) = hub.processes.values()
    folder = process.log.read_text().partition("loading AutoencoderKL from ")[2].splitlines()[0]
    assert json.loads(Path(folder, "../endpoint.json").read_text())["model"] == "tiny"
