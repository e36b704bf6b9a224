"""Tests of docs/running.md: its commands run on the manifests without a cluster, and Ray's config fits the service."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from handlers.serving.settings import Settings
from scripts.local_server import ROOT
from tests.support.manifests import KUBECTL, VARIABLES, Manifests

pytestmark = pytest.mark.slow

GUIDE = (ROOT / "docs" / "running.md").read_text()
CLUSTER = GUIDE[GUIDE.index("## A cluster") : GUIDE.index("### Ray")]
COMMANDS = re.findall(r"^ *\$ (.*?)(?: +#.*)?$", CLUSTER, re.MULTILINE)
RAY = ROOT / "deploy" / "ray"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of deploy/ in which the guide's `sed` commands have run."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    for command in COMMANDS:
        if command.startswith("sed "):
            subprocess.run(command, shell=True, cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("kubectl apply -k ")])
def test_an_overlay_of_the_guide_is_applied(command: str, checkout: Path) -> None:
    manifests = Manifests.render(checkout / command.removeprefix("kubectl apply -k "))
    assert manifests.container["image"].startswith("ghcr.io/my-name/remote-vae:")
    assert {rule["host"] for each in manifests.all("Ingress") for rule in each["spec"]["rules"]} <= {"vae.my-lab.org"}


def test_the_guide_applies_every_overlay() -> None:
    applied = {command.rpartition("/")[2] for command in COMMANDS if command.startswith("kubectl apply -k ")}
    assert applied == {path.name for path in (ROOT / "deploy" / "kubernetes" / "overlays").iterdir()}


def test_the_secret_of_the_guide_is_the_pods(checkout: Path) -> None:
    command = next(command for command in COMMANDS if "create secret" in command)
    command = f"{command.replace('kubectl', str(KUBECTL), 1)} --dry-run=client --output=yaml"
    secret = yaml.safe_load(subprocess.run(command, shell=True, capture_output=True, check=True).stdout)
    manifests = Manifests.render(checkout / "deploy" / "kubernetes" / "overlays" / "cpu")
    assert {"secretRef": {"name": secret["metadata"]["name"]}} in manifests.container["envFrom"]
    assert secret["metadata"]["namespace"] == manifests.get("Namespace")["metadata"]["name"]
    assert len(secret["data"]["API_TOKEN"]) > 32


def test_the_guide_names_resources_of_the_manifests(checkout: Path) -> None:
    manifests = Manifests.render(checkout / "deploy" / "kubernetes" / "overlays" / "cpu")
    named = re.findall(
        r"kubectl -n ([\w-]+) .*?(deployment|service)/([\w-]+)(?: \d+:(\d+))?$", "\n".join(COMMANDS), re.M
    )
    assert len(named) == 2
    for namespace, kind, name, port in named:
        resource = manifests.get(kind.capitalize(), name)
        assert resource["metadata"]["namespace"] == namespace
        assert not port or int(port) in {each["port"] for each in resource["spec"]["ports"]}


def test_the_guide_describes_every_component() -> None:
    described = re.findall(r"^\| `([\w-]+)` \|", CLUSTER, re.MULTILINE)
    assert set(described) == {path.name for path in (ROOT / "deploy" / "kubernetes" / "components").iterdir()}


def test_the_config_of_ray_fits_the_service() -> None:
    """Ray is too large to install for a test. `deploy/ray` was tried by hand."""
    (application,) = yaml.safe_load((RAY / "config.yaml").read_text())["applications"]
    (deployment,) = application["deployments"]
    module, _, name = application["import_path"].partition(":")
    code = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    assert name in {target.id for node in code.body if isinstance(node, ast.Assign) for target in node.targets}
    assert deployment["name"] in {node.name for node in code.body if isinstance(node, ast.ClassDef)}
    assert application["runtime_env"]["env_vars"].keys() <= VARIABLES
    settings = Settings()
    assert deployment["max_ongoing_requests"] > settings.max_queue
    assert deployment["graceful_shutdown_timeout_s"] >= settings.timeout
