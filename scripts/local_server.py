"""A server process on this machine inside a `with` block, for the demo, the benchmark and the tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import SystemRandom

import requests

ROOT = Path(__file__).parent.parent


@contextmanager
def serve(
    *arguments: str, log: Path, command: Sequence[str] = ("-m", "scripts.serve"), **environment: str
) -> Iterator[str]:
    """Start `python <command> --port <free port> <arguments>`, yield its URL once it is healthy, and stop it.

    The server sees only the `VAE_*` and `HF_*` variables in `environment`. From now on this process takes SIGTERM as
    Ctrl-C, so no server outlives it.

    Raises:
        RuntimeError: the server ended, or was not healthy within two minutes; the message has its log.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = start_process((*command, "--port", str(port), *arguments), log, {**clean_environment(), **environment})
    try:
        wait_until_healthy(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def start_process(arguments: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Start `python <arguments>` in the project's folder."""
    with log.open("w") as output:
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)


def wait_until_checked(url: str) -> None:
    """Wait until a model's fast passes are checked, which runs between requests."""
    while "off: not checked yet" in requests.get(f"{url}/config", timeout=60).json()["fast"].values():
        time.sleep(0.5)


def free_port() -> int:
    """Return a port on which nothing listens.

    The kernel gives none of these ports to a connection or a server of its own choice (Linux: those from 32768 on), so
    a port stays free until it is used, and while its server restarts.
    """
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port := SystemRandom().randrange(20_000, 32_000)))
            return port


def clean_environment() -> dict[str, str]:
    """Return the environment of this process without the variables of the service."""
    own = {"API_TOKEN", "MODEL", "HOST", "PORT", "WEIGHTS", "DEVICE", "DTYPE"}
    return {
        name: value for name, value in os.environ.items() if name not in own and not name.startswith(("VAE_", "HF_"))
    }


def wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    """Raise `RuntimeError` with the log if the process ends first, or takes more than two minutes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        except (requests.ConnectionError, requests.Timeout):
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the server did not come up; its log:\n{log.read_text()}")
