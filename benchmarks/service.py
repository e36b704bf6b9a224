"""The service over HTTP: latency, throughput and `/health` under load, against a bare loop of the same VAE."""

from __future__ import annotations

import math
import os
import re
import statistics
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from time import perf_counter, process_time, sleep
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

from benchmarks.forward import Size, inputs, timed
from handlers.serving.vae.vae import VAE

FORMATS = {
    "jpg": {"image_format": "jpg"},
    "png": {"image_format": "png"},
    "uint8": {"output_type": "pt", "partial_postprocess": "true"},
}


class Load(NamedTuple):
    """Requests to the service."""

    model: str
    size: int
    """Height and width in pixels."""
    format: str
    clients: int
    count: int
    """Requests in each round."""
    rounds: int = 2


class Client:
    """One connection. It uses `http.client`, which takes little CPU on a small machine."""

    def __init__(self, url: str, key: str, size: Size, image_format: str) -> None:
        latents = inputs(key, "decode", size)
        parameters = {"shape": list(latents.shape), "dtype": "float32", **FORMATS[image_format]}
        self.body = latents.numpy().tobytes()
        self.path = "/?" + urlencode(parameters, doseq=True)
        self.connection = HTTPConnection(urlsplit(url).netloc, timeout=600)
        self.last_use = perf_counter()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.connection.close()

    def post(self) -> tuple[float, float]:
        """Send one request. Return its milliseconds, and those in the VAE according to the response."""
        start = perf_counter()
        if start - self.last_use > 2:  # the server closes an idle connection after 5 s
            self.connection.close()
        self.connection.request("POST", self.path, self.body, {"Content-Type": "tensor/binary"})
        response = self.connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {content[:300]!r}")
        vae = re.search(r"vae;dur=([\d.]+)", response.getheader("Server-Timing", ""))
        self.last_use = perf_counter()
        return (self.last_use - start) * 1000, float(vae[1]) if vae else math.nan


def latency(url: str, key: str, vae: VAE, size: Size, image_format: str, count: int) -> dict[str, Any]:
    """Measure the requests of one client in turns with bare calls of the VAE, in milliseconds."""
    latents = inputs(key, "decode", size).to(vae.device, vae.dtype)
    with Client(url, key, size, image_format) as client:
        client.post(), vae.decode(latents)
        triples = [(*client.post(), timed(lambda: vae.decode(latents), vae.device) * 1000) for _ in range(count)]
    http, inside, bare = map(list, zip(*triples, strict=True))
    return {
        "model": key,
        "size": size,
        "format": image_format,
        "count": count,
        "http_ms": percentiles(http),
        "bare_ms": percentiles(bare),
        "difference_ms": statistics.median(http) - statistics.median(bare),
        "overhead_ms": statistics.median(whole - vae for whole, vae in zip(http, inside, strict=True)),
    }


def throughput(url: str, vae: VAE, load: Load) -> dict[str, Any]:
    """Measure responses a second with several clients, in turns with a bare loop of the VAE.

    The clients run in this process. `client_cpu` is the share of the machine's cores that they take.
    """
    key, size, count = load.model, (load.size, load.size, None), load.count
    latents = inputs(key, "decode", size).to(vae.device, vae.dtype)
    bare, served, cpu, latencies, health = [], [], [], [], []
    with ExitStack() as connections:
        pool = [connections.enter_context(Client(url, key, size, load.format)) for _ in range(load.clients)]
        pool[0].post(), vae.decode(latents)
        for _ in range(load.rounds):
            loop = max(4, count // 2)
            bare.append(loop / timed(lambda loop=loop: [vae.decode(latents) for _ in range(loop)], vae.device))
            with polled(url, health):
                start, cpu_start = perf_counter(), process_time()
                latencies += run(pool, count)
                seconds = perf_counter() - start
            served.append(count / seconds)
            cpu.append((process_time() - cpu_start) / seconds / cores())
    ratios = [service / loop for service, loop in zip(served, bare, strict=True)]
    return {
        "model": key,
        "size": size,
        "format": load.format,
        "clients": load.clients,
        "count": count * load.rounds,
        "per_second": statistics.mean(served),
        "bare_per_second": statistics.mean(bare),
        "ratio": statistics.mean(ratios),
        "ratios": ratios,
        "latency_ms": percentiles(latencies),
        "health_ms": percentiles(health),
        "client_cpu": statistics.mean(cpu),
    }


def run(pool: list[Client], count: int) -> list[float]:
    """Send `count` requests from these clients, each one after its last response. Return the milliseconds of each."""

    def work(client: Client, requests: int) -> list[float]:
        return [client.post()[0] for _ in range(requests)]

    share = [count // len(pool) + (index < count % len(pool)) for index in range(len(pool))]
    with ThreadPoolExecutor(len(pool)) as threads:
        return [ms for times in threads.map(work, pool, share) for ms in times]


@contextmanager
def polled(url: str, times: list[float]) -> Iterator[None]:
    """Request `/health` ten times a second inside the block, and append the milliseconds to `times`."""
    stop = threading.Event()

    def poll() -> None:
        with closing(HTTPConnection(urlsplit(url).netloc, timeout=600)) as connection:
            while not stop.is_set():
                start = perf_counter()
                connection.request("GET", "/health")
                connection.getresponse().read()
                times.append((perf_counter() - start) * 1000)
                sleep(0.1)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def percentiles(values: list[float]) -> dict[str, float]:
    ranked = sorted(values)
    return {f"p{p}": ranked[min(len(ranked) - 1, p * len(ranked) // 100)] for p in (50, 95, 99)}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
