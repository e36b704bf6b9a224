"""The handler as a plain object, as the toolkit's own routes call it."""

import base64
import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from handlers import MODELS, EndpointHandler
from handlers.serving.errors import RequestError
from handlers.serving.output import tensor_bytes
from tests.conftest import uint8_pixels


@pytest.fixture(scope="module")
def handler(checkpoint: Callable[[str], Path]) -> EndpointHandler:
    return MODELS["flux"](str(checkpoint("flux")))


@pytest.fixture(scope="module")
def video_handler(checkpoint: Callable[[str], Path]) -> EndpointHandler:
    return MODELS["hunyuan-video"](str(checkpoint("hunyuan-video")))


def decoded(handler: EndpointHandler, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return handler.pipeline.vae.model.decode(latents, return_dict=False)[0]


def latents_of(handler: EndpointHandler) -> torch.Tensor:
    shape = (1, 16, 2, 4, 6) if handler.kind == "video" else (1, 16, 4, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def as_base64(latents: torch.Tensor) -> dict:
    parameters = {"shape": list(latents.shape), "dtype": "float32"}
    return {"inputs": base64.b64encode(tensor_bytes(latents)).decode(), "parameters": parameters}


def test_tensor_to_tensor(handler: EndpointHandler) -> None:
    latents = latents_of(handler)
    result = handler({"inputs": latents, "parameters": {"output_type": "pt"}})
    torch.testing.assert_close(result, decoded(handler, latents), atol=1e-5, rtol=0)


def test_bytes_to_tensor(handler: EndpointHandler) -> None:
    latents = latents_of(handler)
    parameters = {"shape": list(latents.shape), "dtype": "float32", "output_type": "pt"}
    result = handler({"inputs": tensor_bytes(latents), "parameters": parameters})
    torch.testing.assert_close(result, decoded(handler, latents), atol=1e-5, rtol=0)


def test_pil_is_the_default_and_gives_a_pil_image(handler: EndpointHandler) -> None:
    latents = latents_of(handler)
    for data in (as_base64(latents), {"inputs": latents}):
        image = handler(data)
        assert isinstance(image, Image.Image)
        assert np.array_equal(np.asarray(image), uint8_pixels(decoded(handler, latents))[0])


def test_base64_to_what_json_can_carry(handler: EndpointHandler) -> None:
    data = as_base64(latents_of(handler))
    data["parameters"]["output_type"] = "pt"
    result = handler(data)
    assert result["parameters"] == {"shape": [1, 3, 32, 48], "dtype": "float32"}
    assert base64.b64decode(result["inputs"]) == tensor_bytes(decoded(handler, latents_of(handler)))


def test_pil_image_is_encoded_for_json(handler: EndpointHandler, photograph: Image.Image) -> None:
    assert handler({"inputs": photograph})["parameters"] == {"shape": [1, 16, 8, 12], "dtype": "float32"}


def test_pixels_to_latents_and_back(handler: EndpointHandler) -> None:
    latents = handler({"inputs": torch.zeros(1, 3, 32, 48)})
    assert latents.shape == (1, 16, 4, 6)


def test_video_as_frames_and_as_mp4(video_handler: EndpointHandler) -> None:
    latents = latents_of(video_handler)
    frames = video_handler({"inputs": latents, "parameters": {"output_type": "pil"}})
    expected = uint8_pixels(decoded(video_handler, latents))
    assert np.array_equal(np.stack([np.asarray(frame) for frame in frames]), expected)
    mp4 = video_handler({"inputs": latents, "parameters": {"output_type": "mp4"}})
    in_json = video_handler(as_base64(latents))
    assert base64.b64decode(in_json) == mp4
    with av.open(io.BytesIO(mp4)) as container:
        assert len(list(container.decode(video=0))) == 5


@pytest.mark.parametrize("inputs", [None, 3, {"latents": 1}])
def test_wrong_inputs(handler: EndpointHandler, inputs: object) -> None:
    with pytest.raises(RequestError, match="`inputs` must be base64 text"):
        handler({"inputs": inputs})


def test_a_wrong_request_leaves_the_next_one_unharmed(handler: EndpointHandler) -> None:
    with pytest.raises(RequestError, match="is no shape of this VAE's latents"):
        handler({"inputs": torch.zeros(1, 5, 4, 6)})
    assert handler({"inputs": latents_of(handler)}).size == (48, 32)
