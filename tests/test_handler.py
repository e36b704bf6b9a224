"""Tests of `handler.py` as the Inference Toolkit loads it: module name, path, startup order, an app with `POST /`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import requests
from diffusers import AutoencoderKL
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image

from handlers import MODELS
from scripts.local_server import ROOT, serve
from tests.conftest import Endpoint, uint8_pixels
from tests.support import forked

pytestmark = pytest.mark.slow

STAND_IN = ("-m", "uvicorn", "webservice_starlette:app", "--app-dir", str(ROOT / "tests" / "support" / "toolkit"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Path:
    """Save a deployed repository: the code, `endpoint.json`, the weights in `vae/`."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copy(ROOT / "handler.py", folder)
    shutil.copytree(ROOT / "handlers", folder / "handlers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(checkpoint("flux"), folder / "vae")
    (folder / "endpoint.json").write_text(json.dumps({"model": "flux"}))
    return folder


def test_the_client_of_diffusers_works_with_the_toolkit(
    repository: Path, tmp_path: Path, photograph: Image.Image
) -> None:
    log = tmp_path / "log"
    with serve(log=log, command=STAND_IN, HF_MODEL_DIR=str(repository), PYTHONSAFEPATH="1") as url:
        vae = AutoencoderKL.from_pretrained(repository / "vae").eval()
        endpoint = Endpoint("flux", url, vae, log)
        latents = endpoint.latents()
        image = remote_decode(url, latents, image_format="png", **endpoint.scaling)
        assert np.array_equal(np.asarray(image), uint8_pixels(endpoint.decoded(latents))[0])
        assert remote_encode(url, photograph, **endpoint.scaling).shape == (1, 16, 8, 12)
        assert requests.get(f"{url}/health", timeout=5).text == "Ok"
        for method, path, status in (("GET", "/nowhere", 404), ("DELETE", "/", 405), ("POST", "/", 400)):
            response = requests.request(method, url + path, timeout=5)
            assert (response.status_code, list(response.json())) == (status, ["error"])


def import_handler(folder: Path, code: str = "", **environment: str) -> tuple[int, str, str]:
    """Return the exit status, the output and the errors of a process that imports the handler in a folder."""
    code = f"from handler import EndpointHandler; print(EndpointHandler.checkpoint); {code}"
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
