"""A service that sleeps instead of computing: its latents are zeros. It shows the speed and the faults of a client."""

from __future__ import annotations

import io
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from scripts.local_server import free_port

CONFIG: dict[str, Any] = {
    "version": "0",
    "model": "sdxl",
    "checkpoint": "none",
    "vae_class": "AutoencoderKL",
    "diffusers": "0",
    "vae_config": {"latent_channels": 4, "block_out_channels": [32] * 4, "norm_num_groups": 32},
    "buffers": {},
    "dtype": "float32",
    "device": "none",
    "kind": "image",
    "sample_modes": ["argmax", "sample", "moments"],
    "latents": {
        "channels": 4,
        "layout": "BCHW",
        "pipeline_layout": "BCHW",
        "layouts": ["BCHW"],
        "vae_scale_factor": 8,
        "clip": 1,
        "least_frames": 1,
        "takes_scaled": False,
        "comfyui": "raw",
    },
    "pixels": {"layout": "BCHW", "channels": 3, "upscale": 1, "frame_counts": [1, 1, 1], "statistics": None, "fps": 24},
    "limits": {"max_body_mb": 512, "max_pixels": 1 << 27, "max_frames": 1, "max_batch": 64},
}


class SleepingService(ThreadingHTTPServer):
    """Each attribute is a fault. By default there is none."""

    daemon_threads = True
    request_queue_size = 200

    def __init__(self, seconds: float = 0, **config: Any) -> None:
        super().__init__(("127.0.0.1", free_port()), Handler)  # a stopped one's port stays free
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.seconds = seconds
        self.config = {**CONFIG, **config}
        self.served = 0
        """Number of responses with latents."""
        self.error: tuple[int, str] | None = None
        """Status and message of every POST."""
        self.breaks_after: int | None = None
        """Number of responses after which every connection breaks."""
        self.refuses: bytes | None = None
        """First byte of pixels, or of a file, that fail with the status `refusal`."""
        self.refusal = 500
        self.received: list[int] = []
        """Bytes of each body."""
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have disconnected."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: SleepingService

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, json.dumps(self.server.config).encode())

    def do_POST(self) -> None:
        service = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        service.received.append(len(body))
        if service.breaks_after is not None and service.served >= service.breaks_after:
            self.close_connection = True
            return
        if service.error or body[:1] == service.refuses:
            status, message = service.error or (service.refusal, "no")
            self._send(status, json.dumps({"error": message}).encode())
            return
        time.sleep(service.seconds)
        if self.headers["Content-Type"] == "image/jpeg":
            width, height = Image.open(io.BytesIO(body)).size
            sizes = [1, height, width, 3] if service.config["kind"] == "image" else [1, 3, 1, height, width]
        else:
            sizes = [int(size) for size in parse_qs(urlsplit(self.path).query)["shape"]]
        if len(sizes) == 5:
            batch, _, frames, height, width = sizes
            shape = [batch, 16, (frames + 3) // 4, height // 8, width // 8]
        else:
            batch, height, width, _ = sizes
            shape = [batch, 4, height // 8, width // 8]
        with service.lock:
            service.served += 1
        self._send(200, bytes(4 * math.prod(shape)), shape=json.dumps(shape), dtype="float32")

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response_only(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def sleeping_service(seconds: float = 0, **config: Any) -> Iterator[SleepingService]:
    with SleepingService(seconds, **config) as service:
        threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True).start()
        yield service
        service.shutdown()
