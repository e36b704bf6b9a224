"""Tests that frames decoded chunk by chunk equal diffusers' result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from benchmarks.peak import peak_bytes
from handlers import MODELS
from handlers.serving.vae.chunks import decode_chunks
from handlers.serving.vae.low_memory import reduced_peak
from handlers.serving.vae.weights import find_class


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Any:
    return diffusers.AutoencoderKLHunyuanVideo.from_pretrained(checkpoint("hunyuan-video")).eval()


def latents(latent_frames: int, batch: int = 1, height: int = 16, width: int = 24) -> torch.Tensor:
    shape = (batch, 16, latent_frames, height // 8, width // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(latent_frames))


@pytest.fixture
def decoded(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the latent frames of each chunk that the model decodes."""
    chunks, forward = [], model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda z: chunks.append(z.shape[2]) or forward(z))
    return chunks


@pytest.fixture
def mode(request: pytest.FixtureRequest, model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the model to a mode as `VAE` does, with tiles so small that these frames take six."""
    monkeypatch.setattr(model, "use_slicing", request.param in ("sliced", "tiled"))
    monkeypatch.setattr(model, "use_tiling", request.param == "tiled")
    for side in ("height", "width"):
        monkeypatch.setattr(model, f"tile_sample_min_{side}", 16)
        monkeypatch.setattr(model, f"tile_sample_stride_{side}", 8)
    with nullcontext() if request.param == "full" else reduced_peak(model):
        yield request.param


CHUNKS = {
    1: [1],
    2: [5],
    5: [13, 4],
    6: [13, 8],
    7: [13, 12],
    9: [13, 12, 8],
    16: [13, 12, 12, 12, 12],
}
"""Frames of each chunk by number of latent frames."""


@pytest.mark.parametrize(
    ("mode", "latent_frames"),
    [
        *(("full", count) for count in CHUNKS),
        *((mode, count) for mode in ("reduced", "sliced", "tiled") for count in (5, 9)),
    ],
    indirect=["mode"],
)
@torch.inference_mode()
def test_chunks_equal_diffusers_bit_for_bit(model: Any, mode: str, latent_frames: int) -> None:
    """Test each number of chunks, and in every mode a last chunk that is shorter."""
    z = latents(latent_frames, batch=2 if mode == "sliced" else 1)
    expected = model.decode(z, return_dict=False)[0]
    result = list(decode_chunks(model, z))
    assert [frames.shape[2] for frames in result] == CHUNKS[latent_frames]
    assert torch.equal(torch.cat(result, dim=2), expected)


@torch.inference_mode()
def test_a_chunk_is_yielded_before_the_next_is_decoded(model: Any, decoded: list[int]) -> None:
    counts = [(frames.shape[2], list(decoded)) for frames in decode_chunks(model, latents(7))]
    assert counts == [(13, [5]), (12, [5, 4])]


@torch.inference_mode()
def test_a_chunk_without_new_frames_is_not_decoded(model: Any, decoded: list[int]) -> None:
    list(decode_chunks(model, latents(7)))
    ours = decoded.copy()
    model.decode(latents(7))
    assert (ours, decoded[len(ours) :]) == ([5, 4], [5, 4, 1])


@torch.inference_mode()
def test_a_failure_midway_restores_the_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.decode(latents(6)).sample
    chunks = decode_chunks(model, latents(6))
    next(chunks)
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "forward", lambda z: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(chunks)
    assert torch.equal(model.decode(latents(6)).sample, expected)


@torch.inference_mode()
def test_an_image_is_one_chunk() -> None:
    handler = MODELS["tiny"]
    model = find_class(handler.vae_class).from_config(handler.published_config).eval()
    z = torch.zeros(1, handler.published_config["latent_channels"], 4, 4)
    (pixels,) = decode_chunks(model, z)
    assert torch.equal(pixels, model.decode(z).sample)


def test_the_peak_does_not_grow_with_the_video(model: Any) -> None:
    """Measure the memory on the device, where each chunk is converted to uint8 and freed."""

    def peak(z: torch.Tensor) -> int:
        return peak_bytes(lambda: [len((frames * 255).to(torch.uint8)) for frames in decode_chunks(model, z)])

    with torch.inference_mode():
        assert peak(latents(16)) == peak(latents(9))
