"""Fixtures: small checkpoints of the published classes, and a real server for each, started on first use."""

from __future__ import annotations

import os

# Set before the import of Triton and torch: kernels run on a CPU, and the small passes of the tests and their servers
# run on one thread each, because there are as many busy processes as cores. Models run diffusers' own pass, whose
# values most tests compare; tests/serving/test_fast.py has the tests of the default.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VAE_FAST", "0")

import io
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import diffusers
import huggingface_hub
import numpy as np
import pytest
import requests
import torch
from filelock import FileLock
from PIL import Image

from handlers import MODELS
from handlers.serving.media.output import describe, tensor_bytes
from scripts import local_server
from scripts.local_server import serve
from tests.support import forked
from tests.support.small_service import Service, running_service, save_checkpoints

local_server.start_process = forked.start
# The `make` that runs the tests sets these variables.
for variable in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "PYTEST_ADDOPTS"):
    os.environ.pop(variable, None)
# A shell starts a background process (`nohup make test &`) with Ctrl-C ignored, and the tests' processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# An endpoint never deploys. Its container has an older huggingface_hub than deploying needs (requirements/deploy.txt).
# With that older version, pytest does not collect the tests of deploying.
collect_ignore_glob = (
    ["test_deploy*.py", "test_canary.py"] if int(huggingface_hub.__version__.split(".")[0]) < 2 else []
)

SLOW = {"service", "running", "checkpoint", "hub"}
"""Fixtures that start servers. Tests that use them are marked `slow`. A few other slow tests carry the mark themselves.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def forbid_servers_in_quick_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a quick test that starts a server, so that `make test-quick` stays quick."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(
            local_server, "start_process", lambda *_: pytest.fail("mark this test slow: it starts a server")
        )


SERVERS = ("standalone", "toolkit")
"""Servers that run the service."""

SMALL = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1}
IMAGE_MODELS = ("sd-v1", "sdxl", "flux")


def save_small_checkpoint(key: str, folder: Path) -> Path:
    """Save a model with few channels and the rest of its published config, in float32.

    Its random weights give values that fill [-1, 1] and beyond.
    """
    model = MODELS[key]
    torch.manual_seed(sum(key.encode()))
    vae = getattr(diffusers, model.vae_class).from_config({**model.published_config, **SMALL})
    conv_out = vae.decoder.conv_out.conv if model.kind == "video" else vae.decoder.conv_out
    with torch.no_grad():
        conv_out.weight.mul_(6)
    vae.save_pretrained(folder)
    return folder


@dataclass
class Endpoint:
    """A running service, and the same weights in plain diffusers as the reference."""

    key: str
    url: str
    vae: Any
    log: Path
    kind: str = field(init=False)
    scaling: dict[str, float] = field(init=False)
    """Scaling parameters that a client sends for this model."""

    def __post_init__(self) -> None:
        self.kind = MODELS[self.key].kind
        shift = self.vae.config.get("shift_factor")
        self.scaling = {"scaling_factor": self.vae.config.scaling_factor, **({"shift_factor": shift} if shift else {})}

    def latents(
        self, batch: int = 1, height: int = 64, width: int = 96, frames: int = 2, seed: int = 0
    ) -> torch.Tensor:
        """Return random scaled latents for images of this height and width."""
        time_axis = (frames,) if self.kind == "video" else ()
        shape = (batch, self.vae.config.latent_channels, *time_axis, height // 8, width // 8)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        raw = latents / self.scaling["scaling_factor"] + self.scaling.get("shift_factor", 0)
        return self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0]

    @torch.no_grad()
    def encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        latents = self.vae.encode(pixels).latent_dist.mode()
        return (latents - self.scaling.get("shift_factor", 0)) * self.scaling["scaling_factor"]

    def post(
        self, tensor: torch.Tensor, path: str = "/", headers: dict[str, str] | None = None, **parameters: Any
    ) -> Any:
        """POST a tensor as `remote_decode` does. Add its shape and dtype unless `parameters` has them."""
        shape, dtype = describe(tensor)
        return requests.post(
            self.url + path,
            data=tensor_bytes(tensor),
            params={"shape": shape, "dtype": dtype, **parameters},
            headers={"Content-Type": "tensor/binary", **(headers or {})},
            timeout=60,
        )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a model's small checkpoint and returns its folder."""
    folders: dict[str, Path] = {}

    def get(key: str) -> Path:
        if key not in folders:
            folders[key] = save_small_checkpoint(key, tmp_path_factory.mktemp(key))
        return folders[key]

    return get


@pytest.fixture(scope="session")
def running(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Endpoint]]:
    """Return a function that starts the endpoint of a model key once in a session."""
    endpoints: dict[str, Endpoint] = {}
    with ExitStack() as servers:

        def get(key: str) -> Endpoint:
            if key not in endpoints:
                weights, log = checkpoint(key), tmp_path_factory.mktemp("log") / f"{key}.log"
                url = servers.enter_context(serve("--model", key, "--weights", str(weights), log=log))
                vae = getattr(diffusers, MODELS[key].vae_class).from_pretrained(weights).eval()
                endpoints[key] = Endpoint(key, url, vae, log)
            return endpoints[key]

        yield get


@contextmanager
def faulty_endpoint(kind: str, key: str, weights: Path, log: Path, **environment: str) -> Iterator[Endpoint]:
    """Run `tests/support/faulty_server.py`."""
    command = ("-m", "tests.support.faulty_server", kind)
    if toolkit := os.environ.get("TOOLKIT"):
        environment["TOOLKIT"] = toolkit
    with serve("--model", key, "--weights", str(weights), log=log, command=command, **environment) as url:
        yield Endpoint(key, url, getattr(diffusers, MODELS[key].vae_class).from_pretrained(weights).eval(), log)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run the server of every model's small checkpoint."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(shared / "checkpoints.lock"):  # the first process makes the checkpoints
        save_checkpoints(shared / "checkpoints")
    with running_service(shared / "checkpoints", base / "service.log") as running:
        yield running


@pytest.fixture(params=IMAGE_MODELS)
def image_endpoint(request: pytest.FixtureRequest, running: Callable[[str], Endpoint]) -> Endpoint:
    return running(request.param)


@pytest.fixture
def video_endpoint(running: Callable[[str], Endpoint]) -> Endpoint:
    return running("hunyuan-video")


@pytest.fixture(params=[*IMAGE_MODELS, "hunyuan-video"])
def endpoint(request: pytest.FixtureRequest, running: Callable[[str], Endpoint]) -> Endpoint:
    return running(request.param)


@pytest.fixture(scope="session")
def photograph() -> Image.Image:
    """Return a crop of scikit-image's astronaut, 96x64 pixels."""
    from skimage import data

    return Image.fromarray(data.astronaut()).crop((180, 40, 276, 104))


def uint8_pixels(decoded: torch.Tensor) -> np.ndarray:
    """Convert a decoded batch as diffusers' pipelines do: to uint8 [B, H, W, 3], or [F, H, W, 3] for a video."""
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.video_processor import VideoProcessor

    if decoded.ndim == 5:
        images = VideoProcessor().postprocess_video(decoded, output_type="pil")[0]
    else:
        images = VaeImageProcessor().postprocess(decoded, output_type="pil")
    return np.stack([np.asarray(image) for image in images])


def same_video(actual: bytes, expected: bytes) -> bool:
    """Return whether two MP4 files show the same frames.

    x264's threads do not always give the same bytes. Noise then differs by up to 3.5 levels, and another frame by tens.
    """
    videos = []
    for file in (actual, expected):
        with av.open(io.BytesIO(file)) as container:
            videos.append(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
    first, second = videos
    return first.shape == second.shape and np.abs(first.astype(int) - second).mean() < 5
