"""Tests of the container image TAG, started by docker, or by buildah if no docker runs: `make image test-image`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import torch
from diffusers import AutoencoderKL
from diffusers.utils.remote_utils import remote_decode

from remote_vae import RemoteVAE
from scripts.local_server import ROOT, free_port, wait_until_healthy
from traffic.servers import listening

TAG = os.environ.get("TAG", "remote-vae")
HAS_DOCKER = subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def read_config() -> dict[str, Any]:
    if HAS_DOCKER:
        return json.loads(output("docker", "image", "inspect", TAG))[0]["Config"]
    return json.loads(output("buildah", "inspect", "--type", "image", TAG))["Docker"]["config"]


CONFIG = read_config()


@dataclass
class Container:
    """A container in which any number of commands run."""

    name: str

    def command(self, *words: str, **environment: str) -> list[str]:
        """Return a command that runs `words` in the container, on the network of this machine."""
        variables = [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
        if HAS_DOCKER:
            options = ["--rm", "--network", "host", "--read-only", "--tmpfs", "/tmp", "--entrypoint", words[0]]
            return ["docker", "run", *options, *variables, TAG, *words[1:]]
        return ["buildah", "run", "--isolation", "chroot", "--network", "host", *variables, self.name, "--", *words]


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    name = "" if HAS_DOCKER else output("buildah", "from", TAG)
    yield Container(name)
    if name:
        output("buildah", "rm", name)


@pytest.fixture(scope="module")
def server(container: Container, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen]]:
    """Start the container without arguments, beside its port, and yield its URL and its process."""
    port, log = free_port(), tmp_path_factory.mktemp("image") / "log"
    words: Sequence[str] = [*CONFIG["Entrypoint"], *(CONFIG["Cmd"] or ())]
    command = container.command(*words, PORT=str(port), OMP_NUM_THREADS="1", VAE_EXACT="1")
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(url, process, log)
        print(f"ready after {time.monotonic() - started:.1f} s")
        yield url, process
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_pixels_are_those_of_diffusers(server: tuple[str, subprocess.Popen]) -> None:
    url, _ = server
    vae = AutoencoderKL.from_pretrained(ROOT / "models" / "tiny")
    latents = torch.randn(1, vae.config.latent_channels, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents).sample
        assert RemoteVAE(url).decode(latents).sample.equal(expected)
    released = remote_decode(url, latents, do_scaling=False, output_type="pt", return_type="pt")
    assert released.equal(expected)


def test_the_health_check_responds(container: Container, server: tuple[str, subprocess.Popen]) -> None:
    url, _ = server
    kind, *check = CONFIG["Healthcheck"]["Test"]
    assert kind == "CMD"
    assert subprocess.run(container.command(*check, PORT=url.rpartition(":")[2]), check=False).returncode == 0
    refused = container.command(*check, PORT=str(free_port()))
    assert subprocess.run(refused, check=False, capture_output=True).returncode == 1


def test_it_runs_as_a_user_without_rights(container: Container) -> None:
    """Test the owners and not the access, since buildah's chroot leaves the user capabilities that docker drops."""
    script = "import os; print(os.getuid(), *(os.stat(f).st_uid for f in ('/app', '/venv', '/repository', '/cache')))"
    assert output(*container.command("python3", "-c", script)) == "1000 0 0 0 1000"


def test_it_holds_the_packages_of_the_lock_and_no_others(container: Container) -> None:
    script = "from importlib.metadata import distributions as d; print(*(f'{x.name}=={x.version}' for x in d()))"
    installed = output(*container.command("python3", "-c", script)).split()
    lock = "lock-cuda.txt" if "NVIDIA_VISIBLE_DEVICES" in str(CONFIG["Env"]) else "lock-cpu.txt"
    lines = (ROOT / "requirements" / lock).read_text().splitlines()
    pinned = [line.removesuffix(" \\") for line in lines if "==" in line]
    assert sorted(map(normal, installed)) == sorted(map(normal, pinned))


def normal(requirement: str) -> str:
    return requirement.lower().replace("_", "-").replace(".", "-")


def test_an_unknown_model_is_one_line(container: Container) -> None:
    words = container.command(*CONFIG["Entrypoint"], MODEL="fluks")
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "there is no model 'fluks' (did you mean flux?)" in result.stderr
    assert "Traceback" not in result.stderr


def test_sigterm_ends_it(server: tuple[str, subprocess.Popen]) -> None:
    """Run last: the other tests share the server."""
    url, process = server
    os.kill(listening(int(url.rpartition(":")[2])).pid, signal.SIGTERM)
    process.wait(timeout=60)  # raises if it does not end
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/health", timeout=5)
