"""Tests of the handler with JSON messages, batches, and a device with little memory."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from handlers import MODELS, EndpointHandler
from handlers.serving.errors import RequestError
from handlers.serving.media.output import tensor_bytes
from handlers.serving.pipeline import Work
from handlers.serving.settings import Settings
from handlers.serving.vae.heap import HEAP
from handlers.serving.vae.memory import Mode
from handlers.serving.vae.vae import VAE
from tests.support.checkpoints import small_tiles
from tests.support.endpoint import uint8_pixels
from tests.support.messages import make_message, send
from tests.support.values import assert_same


@pytest.fixture(scope="module", autouse=True)
def no_fast_pass() -> Iterator[None]:
    """Run diffusers' own pass: tests run passes on their own thread, and the device's would check the fast one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAE_FAST", "0")
        yield


@pytest.fixture(scope="module")
def handler(checkpoint: Callable[[str], Path]) -> EndpointHandler:
    return MODELS["flux"](str(checkpoint("flux")))


@pytest.fixture(scope="module")
def video_handler(checkpoint: Callable[[str], Path]) -> EndpointHandler:
    return MODELS["hunyuan-video"](str(checkpoint("hunyuan-video")))


def decoded(handler: EndpointHandler, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return handler.pipeline.vae.model.decode(latents, return_dict=False)[0]


def make_latents(handler: EndpointHandler) -> torch.Tensor:
    shape = (1, 16, 2, 4, 6) if handler.kind == "video" else (1, 16, 4, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_a_tensor(handler: EndpointHandler) -> None:
    latents = make_latents(handler)
    response = handler(make_message(latents, output_type="pt"))
    assert response["parameters"] == {"shape": [1, 3, 32, 48], "dtype": "float32"}
    torch.testing.assert_close(
        send(handler.pipeline, latents, output_type="pt"), decoded(handler, latents), atol=1e-5, rtol=0
    )


def test_an_image_is_the_default(handler: EndpointHandler) -> None:
    latents = make_latents(handler)
    image = Image.open(io.BytesIO(send(handler.pipeline, latents)))
    assert image.format == "PNG"
    assert_same(image, uint8_pixels(decoded(handler, latents))[0])


def test_an_image_is_encoded(handler: EndpointHandler, photograph: Image.Image) -> None:
    response = handler({"inputs": make_message(photograph)["inputs"], "parameters": None})
    assert response["parameters"] == {"shape": [1, 16, 8, 12], "dtype": "float32"}


def test_pixels_are_encoded(handler: EndpointHandler) -> None:
    assert send(handler.pipeline, torch.zeros(1, 3, 32, 48)).shape == (1, 16, 4, 6)


def test_a_video_as_frames_and_as_mp4(video_handler: EndpointHandler) -> None:
    latents = make_latents(video_handler)
    frames = send(video_handler.pipeline, latents, output_type="pil")
    assert (frames.dtype, tuple(frames.shape)) == (torch.float32, (5, 3, 32, 48))
    with av.open(io.BytesIO(send(video_handler.pipeline, latents, output_type="mp4"))) as container:
        assert len(list(container.decode(video=0))) == 5


@pytest.mark.parametrize("inputs", [None, 3, {"latents": 1}])
def test_wrong_inputs(handler: EndpointHandler, inputs: object) -> None:
    with pytest.raises(RequestError, match="`inputs` must be base64 text"):
        handler({"inputs": inputs})


def test_a_wrong_request_does_not_affect_the_next(handler: EndpointHandler) -> None:
    with pytest.raises(RequestError, match="is no shape of this VAE's latents"):
        send(handler.pipeline, torch.zeros(1, 5, 4, 6))
    assert send(handler.pipeline, make_latents(handler), output_type="pt").shape == (1, 3, 32, 48)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_tensor_that_is_not_finite_is_refused(handler: EndpointHandler, value: float) -> None:
    latents = make_latents(handler)
    latents[0, 3, 2, 1] = value
    with pytest.raises(RequestError, match="the tensor has NaN or infinity") as refusal:
        send(handler.pipeline, latents, output_type="pt")
    assert refusal.value.status == 422


# A convolution over a batch may add up in another order than over one item. The results here are about [-4, 4].
BATCH_TOLERANCE = 1e-4


class TestBatches:
    """Tests of the batches that the queue may form."""

    def test_a_batch_equals_single_requests(self, handler: EndpointHandler) -> None:
        pipeline = handler.pipeline
        messages = [
            ({"output_type": "pt"}, 1),
            ({"output_type": "pt", "partial_postprocess": "true"}, 2),
            ({"output_type": "pil", "scaling_factor": 0.5}, 1),
        ]
        batch = []
        for seed, (parameters, count) in enumerate(messages):
            latents = torch.randn((count, 16, 4, 6), generator=torch.Generator().manual_seed(seed))
            values = {"shape": list(latents.shape), "dtype": "float32", **parameters}
            request = pipeline.parse(tensor_bytes(latents), "tensor/binary", None, values)
            batch.append(Work(request, pipeline.prepare(request).inputs))
        together = pipeline.forward(pipeline.vae, batch)
        alone = [pipeline.forward(pipeline.vae, [work])[0] for work in batch]
        for batched, single in zip(together, alone, strict=True):
            # 1: a value at a rounding boundary
            tolerance = 1 if batched.value.dtype == torch.uint8 else BATCH_TOLERANCE
            torch.testing.assert_close(batched.value, single.value, atol=tolerance, rtol=0)

    def test_only_requests_of_equal_properties_share_a_batch(self, checkpoint: Callable[[str], Path]) -> None:
        pipeline, keys = MODELS["flux"](str(checkpoint("flux"))).pipeline, []
        pipeline.devices.submit = lambda pipeline, work, key, size, future: keys.append(key)  # type: ignore[assignment]
        for channels, height, width, parameters in [
            (16, 4, 6, {}),
            (16, 4, 6, {"partial_postprocess": True}),
            (16, 6, 4, {}),
            (16, 4, 6, {"exact": True}),
            (16, 4, 6, {"decode_chunk_size": 3}),
            (3, 32, 48, {}),
            (3, 32, 48, {"sample_mode": "moments"}),
        ]:
            values = {"shape": [1, channels, height, width], "dtype": "uint8" if channels == 3 else "float32"}
            body = bytes(channels * height * width * (1 if channels == 3 else 4))
            more = {"output_type": "pt", **parameters} if channels == 16 else parameters
            request = pipeline.parse(body, "tensor/binary", None, {**values, **more})
            pipeline.submit(request, pipeline.prepare(request).inputs)
        assert keys[1] == keys[0]
        assert len(set(keys)) == len(keys) - 1

    def test_concurrent_requests_get_their_own_results(self, handler: EndpointHandler) -> None:
        handler.pipeline.device_queue._batch_limit = 4 * 32 * 48
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn((1, 16, 4, 6 + number % 2), generator=generator) for number in range(32)]
        with ThreadPoolExecutor(32) as clients:
            results = list(clients.map(lambda z: send(handler.pipeline, z, output_type="pt"), inputs))
        for latents, result in zip(inputs, results, strict=True):
            torch.testing.assert_close(result, decoded(handler, latents), atol=BATCH_TOLERANCE, rtol=0)


class TestMemory:
    """Tests of a simulated device with little memory."""

    @pytest.fixture
    def vae(self, checkpoint: Callable[[str], Path]) -> VAE:
        return VAE.load(MODELS["sd-v1"], "", Settings(weights=str(checkpoint("sd-v1")), fast=False), "cpu")

    @pytest.mark.parametrize("expected", [mode for mode in Mode if mode is not Mode.FAST])
    def test_the_mode_depends_on_the_free_memory(
        self, vae: VAE, expected: Mode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small_tiles(vae.model, 8)
        vae = VAE(vae.model, MODELS["sd-v1"])
        latents = torch.randn((3, 4, 10, 10), generator=torch.Generator().manual_seed(0))
        free = vae.memory.estimate("decode", vae.layout, latents.shape, 4).needed(expected, 3)
        monkeypatch.setattr(HEAP, "available", lambda: free)
        result, mode = vae.decode(latents)
        assert mode is expected
        if mode is not Mode.TILED:
            expected_pixels = vae.model.decode(latents).sample
            assert "forward" not in vars(vae.model.decoder)
            rounding = 2e-4 * float(expected_pixels.abs().max())
            torch.testing.assert_close(result, expected_pixels, atol=rounding, rtol=0)

    def test_out_of_memory_is_tried_in_the_next_mode(self, vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
        decode, tried = vae.model.decode, []

        def short_of_memory(z: torch.Tensor, **options: object) -> object:
            reduced = "forward" in vars(vae.model.decoder)
            tried.append((reduced, len(z), vae.model.use_tiling))
            if not vae.model.use_tiling:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return decode(z, **options)

        monkeypatch.setattr(vae.model, "decode", short_of_memory)
        _, mode = vae.decode(torch.zeros(2, 4, 8, 8))
        attempts = [(False, 2, False), (True, 2, False), (True, 1, False), (True, 1, True), (True, 1, True)]
        assert (mode, tried) == (Mode.TILED, attempts)
        monkeypatch.setattr(vae.model, "decode", decode)
        assert vae.decode(torch.zeros(2, 4, 8, 8))[1] is Mode.FULL

    def test_a_request_that_never_fits_is_refused_with_its_estimate(
        self, vae: VAE, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(HEAP, "capacity", lambda: 10**9)
        monkeypatch.setattr(vae.model, "decode", lambda z, **options: pytest.fail("it ran"))
        message = r"\[1, 4, 2048, 2048\] takes about 16.3 GB of memory even in tiles, and this device has 1.0 GB for it"
        with pytest.raises(RequestError, match=message) as refused:
            vae.decode(torch.zeros(1, 4, 2048, 2048))
        assert refused.value.status == 422

    def test_a_request_that_does_not_fit_is_not_tried_on_a_cpu(self, vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
        """Test that the pass is not tried, because it would end the process."""
        monkeypatch.setattr(HEAP, "available", lambda: 10**6)
        monkeypatch.setattr(vae.model, "decode", lambda z, **options: pytest.fail("it ran"))
        with pytest.raises(RequestError, match="does not have free now; try again soon") as refused:
            vae.decode(torch.zeros(1, 4, 64, 64))
        assert refused.value.status == 503

    def test_a_request_that_fits_in_no_mode_is_refused(self, vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
        def always_short(z: torch.Tensor, **options: object) -> object:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(vae.model, "decode", always_short)
        with pytest.raises(RequestError, match=r"\[1, 4, 8, 8\] takes about .* does not have free now") as refused:
            vae.decode(torch.zeros(1, 4, 8, 8))
        assert refused.value.status == 503

    def test_out_of_memory_outside_the_vae_is_not_a_bug(
        self, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def short(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr("handlers.serving.media.pixels.to_output", short)
        with pytest.raises(RequestError, match="no free memory for the request now; try again soon") as refused:
            send(handler.pipeline, make_latents(handler))
        assert refused.value.status == 503

    def test_other_errors_are_not_out_of_memory(self, vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(z: torch.Tensor, **options: object) -> object:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        monkeypatch.setattr(vae.model, "decode", broken)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            vae.decode(torch.zeros(1, 4, 8, 8))
