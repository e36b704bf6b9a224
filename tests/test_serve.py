"""The command line of the standalone server: one clear line when it cannot start."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from handlers import MODELS
from scripts.local_server import ROOT, clean_environment, free_port, wait_until_healthy
from tests import forked

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
        (["--model", "sd-v1", "--weights", "{empty}"], "VAE_WEIGHTS={empty} holds no AutoencoderKL"),
        (["--model", "sd-v1", "--weights", "random", "--device", "tpu9"], "VAE_DEVICE: torch cannot use 'tpu9' here"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    arguments = [argument.replace("{empty}", str(tmp_path)) for argument in arguments]
    status, _, said = forked.run("-m", "scripts.serve", *arguments)
    assert status == 1
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: " + message.replace("{empty}", str(tmp_path)))


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


def test_sigterm_to_what_started_a_server_ends_it_too() -> None:
    """As the demo and the benchmarks do."""
    command = [sys.executable, "-c", STARTS_ONE]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        url = process.stdout.readline().strip()
        assert requests.get(url, timeout=5).ok
        process.terminate()
        assert process.wait(timeout=30) != 0
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=5)


def test_sigterm_to_make_ends_the_server(tmp_path: Path) -> None:
    """And not only make, which would leave it on its port."""
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
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
