"""Tests of `deploy/haproxy.cfg`: Debian's HAProxy before two servers that are restarted and killed."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import pytest
import requests
import torch
from diffusers import AutoencoderKL

from handlers.serving.media.output import describe, tensor_bytes
from remote_vae import RemoteVAE
from scripts import local_server
from scripts.local_server import ROOT, clean_environment, free_port, wait_until_healthy
from tests.support import forked
from tests.support.faulty_server import SLOW

TINY = ROOT / "models" / "tiny"
CONFIG = ROOT / "deploy" / "haproxy.cfg"
LATENTS = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
SECONDS = "0.2"
"""Time of a pass of `SLOW`, which sleeps."""


@dataclass
class Server:
    """One of the two servers, on a port that it keeps."""

    log: Path
    port: int = field(default_factory=free_port)

    def start(self) -> None:
        command = ["-m", "tests.support.faulty_server", "standalone", "--model", "tiny", "--weights", str(TINY)]
        environment = {"VAE_DRAIN_DELAY": "5", "VAE_EXACT": "1", "DEVICE_SECONDS": SECONDS}
        self.process = forked.start([*command, "--port", str(self.port)], self.log, clean_environment() | environment)
        wait_until_healthy(f"http://127.0.0.1:{self.port}", self.process, self.log)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=60)


@dataclass
class Balanced:
    """Two servers behind HAProxy."""

    url: str
    servers: list[Server]

    def post(self, seed: int | None = None) -> requests.Response:
        shape, dtype = describe(LATENTS)
        parameters = {"shape": shape, "dtype": dtype, "output_type": "pt", "do_scaling": "false", "seed": seed}
        return requests.post(f"{self.url}/decode", tensor_bytes(LATENTS), params=parameters, timeout=60)

    def state(self, server: Server) -> str:
        """Return HAProxy's opinion on a server: UP or DOWN."""
        name = ("first", "second")[self.servers.index(server)]
        table = requests.get(f"{self.url}/stats;csv", timeout=5).text
        return re.search(rf"^servers,{name},(?:[^,\n]*,){{15}}(\w+)", table, re.MULTILINE)[1]

    def wait_for(self, server: Server, state: str) -> None:
        deadline = time.monotonic() + 60
        while self.state(server) != state:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@contextmanager
def balanced(folder: Path) -> Iterator[Balanced]:
    servers = [Server(folder / "first.log"), Server(folder / "second.log")]
    port, config = free_port(), folder / "haproxy.cfg"
    text = CONFIG.read_text().replace(":8080", f"127.0.0.1:{port}\n    stats uri /stats")
    for server, documented in zip(servers, ("127.0.0.1:8001", "127.0.0.1:8002"), strict=True):
        text = text.replace(documented, f"127.0.0.1:{server.port}")
    config.write_text(text)
    with ExitStack() as started:
        for server in servers:
            server.start()
            started.callback(server.kill)
        haproxy = started.enter_context(subprocess.Popen(["haproxy", "-db", "-f", config]))
        started.callback(haproxy.kill)
        url = f"http://127.0.0.1:{port}"
        local_server.wait_until_healthy(url, haproxy, folder / "haproxy.cfg")
        yield Balanced(url, servers)


@pytest.fixture(scope="module")
def balancer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balanced]:
    with balanced(tmp_path_factory.mktemp("haproxy")) as running:
        for server in running.servers:
            running.wait_for(server, "UP")
        yield running


@contextmanager
def traffic(balancer: Balanced, clients: int = 4) -> Iterator[list[str]]:
    """Send requests during a `with` block, and yield the list of responses that are not 200."""
    failures: list[str] = []
    end = Event()

    def send() -> int:
        count = 0
        while not end.is_set():
            count += 1
            try:
                response = balancer.post(SLOW)
                failures.extend([f"{response.status_code} {response.text[:80]}"] if response.status_code != 200 else [])
            except requests.RequestException as error:
                failures.append(str(error))
        return count

    with ThreadPoolExecutor(clients) as threads:
        sent = [threads.submit(send) for _ in range(clients)]
        try:
            yield failures
        finally:
            end.set()
    assert min(future.result() for future in sent) > 2  # there was traffic


def test_the_configuration_has_no_warnings() -> None:
    result = subprocess.run(["haproxy", "-c", "-f", CONFIG], capture_output=True, text=True, check=True)
    assert "WARNING" not in result.stdout + result.stderr


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    with torch.no_grad():
        return AutoencoderKL.from_pretrained(TINY).decode(LATENTS).sample


def test_pixels_are_those_of_diffusers(balancer: Balanced, expected: torch.Tensor) -> None:
    assert RemoteVAE(balancer.url).decode(LATENTS).sample.equal(expected)


def test_a_restart_of_each_server_in_turn_loses_no_request(balancer: Balanced) -> None:
    with traffic(balancer) as failures:
        for server in balancer.servers:
            server.stop()
            server.start()
            balancer.wait_for(server, "UP")
    assert failures == []


def test_a_killed_server_loses_only_its_own_requests(balancer: Balanced, expected: torch.Tensor) -> None:
    """Test that the client repeats them, and that HAProxy sends the next ones elsewhere, before its check notices."""
    killed = balancer.servers[0]
    remote = RemoteVAE(balancer.url)
    with traffic(balancer) as failures, ThreadPoolExecutor(1) as thread:
        decoded = [thread.submit(lambda: remote.decode(LATENTS).sample) for _ in range(6)]
        killed.kill()
        balancer.wait_for(killed, "DOWN")
        assert all(future.result().equal(expected) for future in decoded)
        killed.start()
        balancer.wait_for(killed, "UP")
    assert len(failures) <= 4, failures  # one of each client of `traffic`, at most


def test_a_body_of_200_mb_passes(balancer: Balanced) -> None:
    """Test that the service's own response to it arrives."""
    body = bytes(200_000_000)
    response = requests.post(f"{balancer.url}/decode?shape=[1]&dtype=float16", body, timeout=120)
    assert response.status_code == 400
    assert "200000000" in response.text


def test_a_queue_of_many_requests_is_served(balancer: Balanced) -> None:
    """Test more requests than the servers take at once, of which the rest waits in HAProxy."""
    with ThreadPoolExecutor(24) as clients:
        responses = list(clients.map(balancer.post, [SLOW] * 24))
    assert [response.status_code for response in responses] == [200] * 24
