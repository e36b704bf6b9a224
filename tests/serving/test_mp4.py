"""Tests of the pipeline for a video: its encoder gets the first frames before the last are decoded."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import SimpleQueue

import av
import numpy as np
import pytest
import torch

from handlers import MODELS, EndpointHandler
from handlers.serving.errors import RequestError
from handlers.serving.media import output
from handlers.serving.media.output import tensor_bytes, write_mp4
from handlers.serving.pipeline import Work
from handlers.serving.vae.memory import Mode
from tests.support.endpoint import same_video, uint8_pixels
from tests.support.messages import send

Actions = list[Callable[[], None]]


@pytest.fixture(scope="module")
def handler(checkpoint: Callable[[str], Path]) -> EndpointHandler:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAE_FAST", "0")  # a check would call `decode`, which some tests replace
        return MODELS["hunyuan-video"](str(checkpoint("hunyuan-video")))


@pytest.fixture(autouse=True)
def no_encoder_is_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name == "mp4":
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def before_chunks(handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> Actions:
    """Return a list of functions. The next one runs before each chunk is decoded."""
    actions: Actions = []
    layer = handler.pipeline.vae.model.post_quant_conv
    forward = layer.forward

    def act_and_forward(z: torch.Tensor) -> torch.Tensor:
        if actions:
            actions.pop(0)()
        return forward(z)

    monkeypatch.setattr(layer, "forward", act_and_forward)
    return actions


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> SimpleQueue[int]:
    """Record the number of each frame that an encoder reads."""
    queue: SimpleQueue[int] = SimpleQueue()

    def watched(frames: Iterable[np.ndarray], fps: float) -> bytes:
        return write_mp4((queue.put(number) or frame for number, frame in enumerate(frames)), fps)

    monkeypatch.setattr(output, "write_mp4", watched)
    return queue


def latents(seed: int = 0) -> torch.Tensor:
    """Return latents of 25 frames, which are decoded in two chunks."""
    return torch.randn((1, 16, 7, 2, 3), generator=torch.Generator().manual_seed(seed))


def mp4(handler: EndpointHandler, z: torch.Tensor) -> bytes:
    return send(handler.pipeline, z, output_type="mp4")


@torch.no_grad()
def encode_with_diffusers(handler: EndpointHandler, z: torch.Tensor) -> bytes:
    return write_mp4(uint8_pixels(handler.pipeline.vae.model.decode(z).sample), handler.fps)


def test_the_first_frames_are_encoded_before_the_last_are_decoded(
    handler: EndpointHandler, before_chunks: Actions, taken: SimpleQueue[int]
) -> None:
    first: list[int] = []
    before_chunks += [lambda: None, lambda: first.extend(taken.get(timeout=10) for _ in range(13))]
    file = mp4(handler, latents())
    assert first == list(range(13))
    assert same_video(file, encode_with_diffusers(handler, latents()))


def test_out_of_memory_midway_starts_again_in_the_next_mode(handler: EndpointHandler, before_chunks: Actions) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    before_chunks += [lambda: None, fail]
    request, inputs = prepared(handler, latents())
    (result,) = handler.pipeline.forward(handler.pipeline.vae, [Work(request, inputs)])
    assert result.mode is Mode.REDUCED
    assert frame_count(handler.pipeline.render(request, result.value).body) == 25


def test_nan_midway_starts_again_in_float32(handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    model, dtypes = handler.pipeline.vae.model, []
    decode = model.decode

    def overflowing(z: torch.Tensor, **options: object) -> tuple[torch.Tensor]:
        dtypes.append(z.dtype)
        (frames,) = decode(z, **options)
        return (frames * torch.nan if dtypes == [torch.bfloat16] * 2 else frames,)

    monkeypatch.setattr(model, "decode", overflowing)
    monkeypatch.setattr(handler.pipeline.vae, "dtype", torch.bfloat16)
    model.to(torch.bfloat16)
    try:
        assert frame_count(mp4(handler, latents())) == 25
    finally:
        model.to(torch.float32)
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_a_decoding_error_reaches_the_request(handler: EndpointHandler, before_chunks: Actions) -> None:
    before_chunks += [lambda: None, lambda: 1 / 0]
    with pytest.raises(ZeroDivisionError):
        mp4(handler, latents())
    assert same_video(mp4(handler, latents()), encode_with_diffusers(handler, latents()))


def test_a_failing_encoder_fails_its_request_only(handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(output, "_add_stream", lambda container, *_: container.add_stream("libx264", pix_fmt="rgb24"))
        with pytest.raises(RequestError, match="the MP4 encoder failed"):
            mp4(handler, latents())
    assert same_video(mp4(handler, latents()), encode_with_diffusers(handler, latents()))


def test_each_video_of_a_batch_is_a_file(handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "write_mp4", lambda frames, fps: (np.stack(list(frames)), fps))
    batch = [Work(*prepared(handler, latents(seed), fps=10 + seed)) for seed in range(2)]
    results = handler.pipeline.forward(handler.pipeline.vae, batch)
    for seed, result in enumerate(results):
        frames, fps = result.value.finish()
        expected, _ = handler.pipeline.vae.decode(latents(seed))
        assert fps == 10 + seed
        assert np.abs(frames.astype(int) - uint8_pixels(expected)).max() <= 1  # a batch may add up in another order


def prepared(handler: EndpointHandler, z: torch.Tensor, **parameters: object) -> tuple[object, torch.Tensor]:
    values = {"shape": list(z.shape), "dtype": "float32", "output_type": "mp4", **parameters}
    request = handler.pipeline.parse(tensor_bytes(z), "tensor/binary", None, values)
    return request, handler.pipeline.prepare(request).inputs


def frame_count(file: bytes) -> int:
    with av.open(io.BytesIO(file)) as container:
        return len(list(container.decode(video=0)))
