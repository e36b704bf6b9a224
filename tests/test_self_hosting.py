"""Tests of what runs the service on other machines: the locked packages, the unit of systemd, HAProxy's settings."""

from __future__ import annotations

import configparser
import re
import shutil
from pathlib import Path

import pytest

from handlers.serving.limits import Limits
from scripts.local_server import ROOT, clean_environment, free_port, wait_until_healthy
from tests.support import forked

UNIT = ROOT / "deploy" / "remote-vae.service"
LIMITS = Limits()
NAME = re.compile(r"^([\w-]+)", re.MULTILINE)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_lock_pins_the_packages_for_serving_alone(target: str) -> None:
    lock = (ROOT / "requirements" / f"lock-{target}.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE))
    assert len(pinned) == len(NAME.findall(lock))  # every package has hashes
    serving = (ROOT / "requirements" / "serve.txt").read_text()
    assert set(NAME.findall(serving.replace("_", "-"))) <= pinned.keys()
    assert not {"pytest", "matplotlib", "mypy", "ruff"} & pinned.keys()
    version = re.search(r"^torch==(.*)", serving, re.MULTILINE)[1]
    assert pinned["torch"] == (f"{version}+cpu" if target == "cpu" else version)
    assert any(name.startswith("nvidia") for name in pinned) is (target == "cuda")


def test_systemd_waits_longer_than_the_service() -> None:
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str
    unit.read(UNIT)
    assert int(unit["Service"]["TimeoutStopSec"]) > LIMITS.drain_delay + LIMITS.grace + 5
    assert unit["Service"]["ExecStart"].endswith("-m scripts.serve")


def test_haproxy_waits_longer_than_the_service() -> None:
    config = (ROOT / "deploy" / "haproxy.cfg").read_text()
    waits = {name: int(seconds) for name, seconds in re.findall(r"timeout ([\w-]+) +(\d+)s", config)}
    assert min(waits["server"], waits["client"]) > LIMITS.timeout
    inter, fall = re.search(r"check inter (\d+)s fall (\d+)", config).groups()
    delay = int(re.search(r"VAE_DRAIN_DELAY=(\d+)", config)[1])
    assert int(inter) * int(fall) < delay


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, "secret"])
def test_the_environment_has_every_setting(token: str | None, tmp_path: Path) -> None:
    """Start the command of the unit and of the container, which has no arguments."""
    port, log = free_port(), tmp_path / "log"
    settings = {"MODEL": "tiny", "HOST": "0.0.0.0", "PORT": str(port), "DEVICE": "cpu", "DTYPE": "float32"}
    environment = clean_environment() | settings | ({"API_TOKEN": token} if token else {})
    process = forked.start(["-m", "scripts.serve"], log, environment)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        warning = f"anybody who reaches 0.0.0.0:{port} may call this service; API_TOKEN=... makes it ask for a token"
        assert (warning in log.read_text()) is (token is None)
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
def test_a_repository_elsewhere(tmp_path: Path) -> None:
    """Serve the repository that is mounted into a container, from the code in the container."""
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "models" / "tiny", repository / "vae")
    (repository / "endpoint.json").write_text('{"model": "tiny"}')
    port, log = free_port(), tmp_path / "log"
    environment = clean_environment() | {"VAE_REPOSITORY": str(repository), "PORT": str(port)}
    process = forked.start(["-m", "scripts.serve"], log, environment)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        assert f"loading AutoencoderKL from {repository / 'vae'}" in log.read_text()
    finally:
        process.terminate()
        process.wait(timeout=30)
