"""Fixtures: small checkpoints of the published classes, and a real server for each, started on first use."""

from __future__ import annotations

import gc
import os

# Set before the import of Triton and torch: kernels run on a CPU, and the small passes of the tests and their servers
# run on one thread each, because there are as many busy processes as cores. Models run diffusers' own pass, whose
# values most tests compare; tests/serving/test_fast.py has the tests of the default.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VAE_FAST", "0")

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import pytest
from PIL import Image

from scripts import local_server
from tests.support import forked

# The process that only distributes the tests loads this file too, and runs none of the fixtures: they import torch.
if TYPE_CHECKING:
    from tests.support.endpoint import Endpoint
    from tests.support.small_service import Service

gc.disable()  # until all test modules are imported: collections would take a tenth of that time
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


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Exclude from garbage collection what the imports made. Each collection would take half a second."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


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


IMAGE_MODELS = ("sd-v1", "flux")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a model's small checkpoint and returns its folder."""
    from tests.support.endpoint import save_small_checkpoint

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
    from tests.support.endpoint import running_endpoint

    endpoints: dict[str, Endpoint] = {}
    with ExitStack() as servers:

        def get(key: str) -> Endpoint:
            if key not in endpoints:
                log = tmp_path_factory.mktemp("log") / f"{key}.log"
                endpoints[key] = servers.enter_context(running_endpoint(key, checkpoint(key), log))
            return endpoints[key]

        yield get


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run the server of every model's small checkpoint. All processes of the tests share the checkpoints."""
    from tests.support.small_service import running_service

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
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
