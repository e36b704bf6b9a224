"""Tests of the standalone server's command line, with one clear line when the server cannot start."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests

from handlers import MODELS
from scripts.local_server import ROOT, clean_environment, free_port, wait_until_healthy
from tests.support import forked
from tests.support.hub_server import Repo, run_with_hub, running_hub

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            f"no model was named; the models are: {', '.join(MODELS)}",
        ),
        (["--model", "fluks"], f"there is no model 'fluks' (did you mean flux?); the models are: {', '.join(MODELS)}"),
        (["--model", "sd-v1", "--dtype", "int8"], "VAE_DTYPE: Input should be 'float16', 'bfloat16' or 'float32'"),
        (["--model", "sd-v1", "--weights", "{empty}"], "VAE_WEIGHTS={empty} has no AutoencoderKL"),
        (["--model", "sd-v1", "--weights", "random", "--device", "tpu9"], "VAE_DEVICE: torch cannot use 'tpu9' here"),
    ],
)
def test_a_server_that_cannot_start_has_a_one_line_error(arguments: list[str], message: str, tmp_path: Path) -> None:
    arguments = [argument.replace("{empty}", str(tmp_path)) for argument in arguments]
    status, _, stderr = forked.run("-m", "scripts.serve", *arguments)
    assert status == 1
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("error: " + message.replace("{empty}", str(tmp_path)))


SERVE = 'import runpy; runpy.run_module("scripts.serve", run_name="__main__", alter_sys=True)'


def test_a_checkpoint_that_the_hub_refuses(tmp_path: Path) -> None:
    """Test the command. `tests/serving/test_hub.py` has other reasons."""
    checkpoint = MODELS["flux"].checkpoint
    with running_hub(tmp_path) as running:
        running.repos[checkpoint] = Repo(gated=True)
        running.repos[checkpoint].commit({"vae/config.json": b"{}"})
        status, _, error = run_with_hub(running.url, tmp_path, SERVE, "--model", "flux")
    assert (status, "Traceback" in error) == (1, False)
    assert error.splitlines()[-1].startswith(f"error: {checkpoint} is gated: accept its conditions on")


FEW_DESCRIPTORS = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))
runpy.run_module("scripts.serve", run_name="__main__")
"""


@pytest.mark.parametrize("hard", [64, "resource.getrlimit(resource.RLIMIT_NOFILE)[1]"])
def test_idle_connections_do_not_take_all_file_descriptors(hard: object, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    command = ["-c", FEW_DESCRIPTORS.format(hard=hard), "--model", "tiny", "--port", str(port)]
    process = forked.start(command, log, clean_environment())
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        with ExitStack() as opened:
            for _ in range(100):
                opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            for _ in range(2):
                assert requests.get(f"http://127.0.0.1:{port}/health", timeout=20).ok
        assert len(log.read_text().splitlines()) < 30
    finally:
        process.terminate()
        process.wait(timeout=30)


SERVER = """
from http.server import BaseHTTPRequestHandler, HTTPServer
import sys

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

HTTPServer(("127.0.0.1", int(sys.argv[2])), Healthy).serve_forever()
"""
STARTS_ONE = f"""
import time
from pathlib import Path
from scripts.local_server import serve

with serve(log=Path({os.devnull!r}), command=("-c", {SERVER!r})) as url:
    print(url, flush=True)
    time.sleep(60)
"""


def test_sigterm_to_a_parent_process_ends_the_server() -> None:
    """Send SIGTERM to a process with a server, such as the demo or the benchmark."""
    command = [sys.executable, "-c", STARTS_ONE]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        url = process.stdout.readline().strip()
        assert requests.get(url, timeout=5).ok
        process.terminate()
        assert process.wait(timeout=30) != 0
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=5)


def test_sigterm_to_make_ends_the_server(tmp_path: Path) -> None:
    """Test with a small server, which gets the arguments of `scripts.serve`. SIGTERM must not end `make` alone."""
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    server = SERVER.replace("sys.argv[2]", 'sys.argv[-1].removeprefix("--port=")')
    (venv / "python").write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-c", server])} "$@"\n')
    (venv / "python").chmod(0o755)
    (venv / ".installed").touch()
    port, log = free_port(), tmp_path / "log"
    command = ["make", "serve", f"VENV={venv.parent}", "MODEL=tiny", f"PORT={port}"]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**clean_environment(), "MAKEFLAGS": ""}, stdout=output, stderr=output
        )
    wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
    os.kill(process.pid, signal.SIGTERM)
    process.wait(timeout=30)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/health", timeout=5)
