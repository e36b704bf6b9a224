"""Run `scripts/deploy.py` against the local Hub: in the process of the tests, for speed, or in its own process.

Deploying has its own environment (requirements/deploy.txt) with a newer huggingface_hub than the endpoint's container.
pytest does not collect these tests with an older one (`tests/conftest.py`).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from unittest.mock import patch

import httpcore2
import pytest
import typer
from typer.testing import CliRunner

from handlers import MODELS
from scripts.deployment.weights import file_names
from scripts.models import why_not_deployable
from tests.support.forked import killed_at_the_end
from tests.support.hub_server import Hub, Repo, identity, running_hub
from tests.support.project_copy import PROJECT, few_files

CLOCK = Path(__file__).parent / "fast_clock"
TOKEN = "hf_writeTokenOfTheTests"
NAMESPACE = "ana"
PUBLISHED = [key for key in MODELS if key != "tiny" and not why_not_deployable(key)]
# Settings of the storage's client: one request for each uncompressed block, and nothing else.
XET = {
    "HF_XET_CLIENT_LEGACY_DIRECT_XORB_UPLOAD": "true",
    "HF_XET_CLIENT_SHARD_API_VERSION": "1",
    "HF_XET_DATA_XORB_COMPRESSION_POLICY": "none",
    "HF_XET_TELEMETRY_ENABLED": "0",
}
BAR = re.compile(r"Processing Files|New Data Upload|Validating|\d%\||\x1b")
"""A progress bar of the storage's client."""
WEIGHTS = ("config.json", "diffusion_pytorch_model.safetensors")
CACHED = {
    "typer.testing._get_command": cache(typer.main.get_command),
    "httpcore2.default_ssl_context": cache(httpcore2.default_ssl_context),
}
"""Functions that a process of a command calls once, and whose results all commands of the tests share."""


@dataclass
class Result:
    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Return standard error without progress bars."""
        return [line for line in self.err.splitlines() if line.strip() and not BAR.search(line)]


@dataclass
class Clock:
    """A stand-in for `time` that records each wait. A wait takes no time, or a little with a real server."""

    real: float = 0
    now: float = 0
    waits: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        time.sleep(self.real)

    def monotonic(self) -> float:
        return self.now


@dataclass
class Runner:
    """A runner of commands: `deploy("deploy", "--model", "flux")` against `hub`, in its own home folder."""

    hub: Hub
    home: Path
    project: Path = PROJECT
    outputs: str = ""
    """The output so far."""
    waits: list[float] = field(default_factory=list)
    """Seconds of each wait in the last run in this process."""

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "VAE_", "PYTHON"))}
        return {
            **kept,
            "PYTHONPATH": str(CLOCK),
            "HOME": str(self.home),
            "HF_HOME": str(self.home / "huggingface"),
            "HF_ENDPOINT": self.hub.url,
            "HF_INFERENCE_ENDPOINTS_ENDPOINT": f"{self.hub.url}/v2",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
            **XET,
            **({"HF_TOKEN": token} if token else {}),
        }

    def __call__(self, *arguments: str, token: str | None = TOKEN, stdin: str = "", **variables: str) -> Result:
        """Run a command with an environment and with `stdin` as its input. A copied project runs as a process."""
        if self.project != PROJECT:
            return self.process(*arguments, token=token, stdin=stdin, **variables)
        from scripts import deploy

        clock = Clock(0.2 if self.hub.serves else 0)
        constants = "huggingface_hub.constants"
        with ExitStack() as patches:
            patches.enter_context(patch.dict(os.environ, {**self.environment(token), **variables}, clear=True))
            patches.enter_context(patch(f"{constants}.HF_HUB_CACHE", str(self.home / "cache")))
            patches.enter_context(patch(f"{constants}.HF_TOKEN_PATH", str(self.home / "token")))
            for name, function in CACHED.items():
                patches.enter_context(patch(name, function))
            for module in ("scripts.deployment.endpoint", "tenacity.nap", "huggingface_hub.utils._http"):
                patches.enter_context(patch(f"{module}.time", clock))
            done = CliRunner().invoke(deploy.app, arguments, input=stdin or None)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        self.waits = clock.waits
        self.outputs += done.stdout + done.stderr
        return Result(done.exit_code, done.stdout, done.stderr)

    def process(self, *arguments: str, token: str | None = TOKEN, stdin: str = "", **variables: str) -> Result:
        """Run a command as its users do."""
        done = subprocess.run(
            [sys.executable, "-m", "scripts.deploy", *arguments],
            cwd=self.project,
            env={**self.environment(token), **variables},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
        )
        self.outputs += done.stdout + done.stderr
        return Result(done.returncode, done.stdout, done.stderr)

    def interrupt(self, *arguments: str) -> Result:
        """Press Ctrl-C when the endpoint exists."""
        command = [sys.executable, "-m", "scripts.deploy", *arguments]
        process = subprocess.Popen(
            command,
            cwd=self.project,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        with killed_at_the_end(process):
            while not self.hub.endpoints and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        self.outputs += out + err
        return Result(process.returncode, out, err)


@pytest.fixture(scope="module", autouse=True)
def storage_client() -> Iterator[None]:
    """Set the environment of the storage's client, which reads it once in a process."""
    with patch.dict(os.environ, {**XET, "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}):
        yield


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path) as hub:
        yield hub


@pytest.fixture
def deploy(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Return a runner with a token that may write, and put the published checkpoints on the Hub.

    A command in this process uploads a project of few files. A test that serves them sets `PROJECT` itself.
    """
    monkeypatch.setattr("scripts.deployment.repository.PROJECT", few_files(tmp_path / "few-files"))
    for key in PUBLISHED:
        checkpoint, folder = MODELS[key].checkpoint, f"{MODELS[key].subfolder}/" if MODELS[key].subfolder else ""
        names = [name for other in PUBLISHED if MODELS[other].checkpoint == checkpoint for name in file_names(other)]
        publish(hub, checkpoint, folder, names)
    hub.tokens[TOKEN] = identity(NAMESPACE, orgs={"lab": "write", "museum": "read"})
    home = tmp_path / "home"
    home.mkdir()
    return Runner(hub, home)


def publish(hub: Hub, repository: str, folder: str = "", names: Iterable[str] = WEIGHTS, **options: bool) -> Repo:
    """Put a checkpoint on the Hub: the two files of the VAE, and files that nobody needs."""
    repo = hub.repos[repository] = Repo(**options)
    wanted = {f"{folder}{name}": f"{repository} {name}".encode() * 40 for name in names}
    repo.commit(
        {**wanted, "README.md": b"about", f"{folder}diffusion_pytorch_model.bin": b"old", "sdxl_vae.safetensors": b"x"}
    )
    return repo
