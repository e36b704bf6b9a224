"""Tests of `handler.py` as the Inference Toolkit loads it: module name, path, startup order, an app with `POST /`."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from diffusers import AutoencoderKL
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image

from handlers import MODELS
from remote_vae.client import LOADING
from scripts.local_server import ROOT, serve
from tests.support import forked
from tests.support.endpoint import Endpoint, uint8_pixels
from tests.support.values import assert_same

pytestmark = pytest.mark.slow

STAND_IN = ROOT / "tests" / "support" / "toolkit"
STABLE_TOOLKIT = ("-m", "uvicorn", "webservice_starlette:app", "--app-dir", str(STAND_IN))
"""Command of the toolkit 0.5.6: its stand-in, or the real one from the checkout in the variable TOOLKIT."""
if checkout := os.environ.get("TOOLKIT"):
    app = "huggingface_inference_toolkit.webservice_starlette:app"
    STABLE_TOOLKIT = ("-m", "uvicorn", app, "--app-dir", f"{checkout}/src")

IDLE_TIMEOUT = 0.5
"""Seconds after which the idle checker ends a worker."""


ARGUMENTS = ["webservice_starlette:app", "-k", "uvicorn.workers.UvicornWorker", "--no-control-socket"]
NEXT_TOOLKIT = (
    "-c",
    "import sys; from gunicorn.app.wsgiapp import run; "
    f"sys.argv[1:] = [*{ARGUMENTS}, '--chdir', {str(STAND_IN)!r}, '--bind', '127.0.0.1:' + sys.argv[2]]; run()",
)
"""Command of the toolkit that follows 0.5.6, in which `--bind` takes the place of `--port N`."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Path:
    """Save a deployed repository: the code, `endpoint.json`, the weights in `vae/`."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copy(ROOT / "handler.py", folder)
    shutil.copytree(ROOT / "handlers", folder / "handlers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(checkpoint("flux"), folder / "vae")
    (folder / "endpoint.json").write_text(json.dumps({"model": "flux"}))
    return folder


@pytest.mark.parametrize("command", [STABLE_TOOLKIT, NEXT_TOOLKIT], ids=["0.5.6", "next"])
def test_the_client_of_diffusers_works_with_the_toolkit(
    command: tuple[str, ...], repository: Path, tmp_path: Path, photograph: Image.Image
) -> None:
    log = tmp_path / "log"
    with serve(log=log, command=command, HF_MODEL_DIR=str(repository), PYTHONSAFEPATH="1") as url:
        vae = AutoencoderKL.from_pretrained(repository / "vae").eval()
        endpoint = Endpoint("flux", url, vae, log)
        latents = endpoint.latents()
        image = remote_decode(url, latents, image_format="png", **endpoint.scaling)
        assert_same(image, uint8_pixels(endpoint.decoded(latents))[0])
        assert remote_encode(url, photograph, **endpoint.scaling).shape == (1, 16, 8, 12)
        assert requests.get(f"{url}/health", timeout=5).text == "Ok"
        for method, path, status in (("GET", "/nowhere", 404), ("DELETE", "/", 405), ("POST", "/", 400)):
            response = requests.request(method, url + path, timeout=5)
            assert (response.status_code, list(response.json())) == (status, ["error"])


def test_an_idle_worker_is_unloaded_but_not_at_work(repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    body = bytes(4 * 16 * 4 * 4)
    parameters = {"shape": [1, 16, 4, 4], "dtype": "float32"}

    def post(data: bytes | Iterator[bytes]) -> requests.Response:
        headers = {"Content-Type": "tensor/binary"}
        return requests.post(url, data=data, params=parameters, headers=headers, timeout=60)

    def slow_body() -> Iterator[bytes]:
        yield body[:100]
        time.sleep(3 * IDLE_TIMEOUT)
        assert "the idle checker ends this worker" not in log.read_text()
        yield body[100:]

    environment = {"HF_MODEL_DIR": str(repository), "PYTHONSAFEPATH": "1"}
    lazy = {"UNLOAD_IDLE": "1", "IDLE_TIMEOUT": str(IDLE_TIMEOUT)}
    with serve(log=log, command=NEXT_TOOLKIT, **environment, **lazy) as url:
        first = post(body)
        assert first.status_code == 400  # the toolkit's own response
        assert first.json()["error"].startswith(LOADING)
        while (health := requests.get(f"{url}/health", timeout=60)).status_code == 503:
            assert health.json() == {"error": LOADING}
        assert health.text == "Ok"
        response = post(slow_body())
        assert response.ok, response.text
        while log.read_text().count("Booting worker") < 2:  # the test ends at its timeout if the worker lives on
            time.sleep(0.1)
        assert requests.get(f"{url}/health", timeout=60).ok  # of the next worker


def test_two_workers_on_one_device_are_refused() -> None:
    status, _, errors = import_handler(ROOT, "", "import gunicorn; ", VAE_MODEL="flux", WORKERS="2")
    assert status != 0
    assert "WORKERS=2: each worker would load the model again" in errors
    assert import_handler(ROOT, VAE_MODEL="flux", WORKERS="2")[0] == 0  # toolkit 0.5.6 does not read it


def import_handler(folder: Path, code: str = "", before: str = "", **environment: str) -> tuple[int, str, str]:
    """Return the exit status, the output and the errors of a process that imports the handler in a folder."""
    code = f"{before}from handler import EndpointHandler; print(EndpointHandler.checkpoint); {code}"
    return forked.run("-c", code, folder=folder, **environment)


def test_endpoint_json_or_the_environment_selects_the_model(repository: Path) -> None:
    assert import_handler(repository) == (0, "black-forest-labs/FLUX.1-schnell\n", "")
    assert import_handler(repository, VAE_MODEL="sdxl") == (0, "madebyollin/sdxl-vae-fp16-fix\n", "")


def test_another_model_ignores_the_weights_in_the_repository(repository: Path) -> None:
    code = "import huggingface_hub.constants; huggingface_hub.constants.HF_HUB_OFFLINE = True; EndpointHandler('.')"
    status, _, errors = import_handler(repository, code, VAE_MODEL="sdxl")
    assert status != 0
    assert "madebyollin/sdxl-vae-fp16-fix" in errors


@pytest.mark.parametrize("environment", [{}, {"VAE_MODEL": "fluks"}])
def test_the_error_of_a_missing_or_unknown_model_lists_the_keys(environment: dict[str, str]) -> None:
    status, _, errors = import_handler(ROOT, **environment)
    assert status != 0
    assert errors.rstrip().endswith(f"the models are: {', '.join(MODELS)}")
