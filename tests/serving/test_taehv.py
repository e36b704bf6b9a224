"""Tests of the TAEHV family: the network against results of the published code, and its models over HTTP."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.peak import peak_bytes
from handlers import MODELS
from handlers.serving.settings import Settings
from handlers.serving.vae.taehv import TinyVideoAutoencoder
from handlers.serving.vae.vae import VAE
from scripts.local_server import serve
from tests.support.small_service import Service
from tests.support.tiny_videos import seeded_values, seeded_weights

pytestmark = pytest.mark.slow

Samples = tuple[float, float, list[float]]
"""Mean, deviation and five values of a tensor."""

PUBLISHED: dict[str, tuple[list[int], Samples, Samples]] = {
    "taew2.1": (
        [9, 24, 16],
        (-0.70897, 0.31123, [-0.86799, -1.0, -0.88359, -0.84953, -0.57518]),
        (0.00241, 0.18613, [-0.14384, 0.28645, -0.09052, -0.27379, -0.35893]),
    ),
    "taew2.2": (
        [9, 48, 32],
        (-0.78996, 0.29178, [-0.98113, -0.74326, -0.74907, -1.0, -1.0]),
        (0.01262, 0.18497, [-0.12792, 0.10642, -0.06506, -0.21827, 0.19774]),
    ),
    "taehv1.5": (
        [9, 48, 32],
        (-0.83776, 0.28572, [-1.0, -1.0, -1.0, -0.64019, -1.0]),
        (-0.0343, 0.22452, [0.1369, -0.03215, -0.00701, -0.19548, -0.17572]),
    ),
    "taecvx": (
        [16, 24, 16],
        (-0.71425, 0.29531, [-1.0, -0.59835, -0.86984, -0.76247, -0.5705]),
        (0.00349, 0.19012, [-0.14041, 0.26458, -0.02566, -0.19586, -0.36646]),
    ),
    "taeltx2": (
        [17, 96, 64],
        (-0.72122, 0.41645, [-1.0, -1.0, -1.0, -1.0, -0.90803]),
        (0.00387, 0.25001, [0.22827, 0.41499, 0.23866, 0.29064, -0.04291]),
    ),
    "taeh3": (
        [22, 48, 32],
        (-0.77374, 0.31224, [-1.0, -0.60383, -0.82693, -0.76605, -0.70463]),
        (-0.05664, 0.15113, [0.00725, 0.0226, 0.0271, -0.2855, -0.17134]),
    ),
}
"""Frames, height and width of decoded pixels, the pixels, and the latents that are encoded, for seeded weights.

They come from the published code, https://github.com/madebyollin/taehv at commit 1f14a56, frame by frame.
"""
LATENT_FRAMES = {"taecvx": 4, "taeh3": 7}
"""Latent frames of these results: even for CogVideoX, a clip and its overlap for MiniMax-H3; 3 of all others."""
SERVED = ["taew2.1", "taecvx", "taeltx2", "taeh3", "lighttaew2.2"]


def network(key: str) -> TinyVideoAutoencoder:
    model = TinyVideoAutoencoder.from_config(MODELS[key].published_config).eval().requires_grad_(False)
    model.load_state_dict(seeded_weights(model.state_dict()))
    return model


def latents(key: str, frames: int | None = None, batch: int = 1, rows: int = 3, columns: int = 2) -> torch.Tensor:
    return seeded_values(batch, MODELS[key].latent_channels, frames or LATENT_FRAMES.get(key, 3), rows, columns)


def pixels(key: str, frames: int, batch: int = 1) -> torch.Tensor:
    side = MODELS[key].vae_scale_factor
    return seeded_values(batch, 3, frames, 3 * side, 2 * side).clamp(-1, 1)


def assert_published(tensor: torch.Tensor, samples: Samples) -> None:
    mean, deviation, values = samples
    flat = tensor.flatten()
    assert flat.mean().item() == pytest.approx(mean, abs=2e-5)
    assert flat.std().item() == pytest.approx(deviation, abs=2e-5)
    assert flat[torch.linspace(0, len(flat) - 1, 5).long()].tolist() == pytest.approx(values, abs=2e-5)


@pytest.mark.parametrize("key", PUBLISHED)
def test_results_equal_the_published_code(key: str) -> None:
    size, decoded, encoded = PUBLISHED[key]
    model = network(key)
    (result,) = model.decode(latents(key))
    assert list(result.shape[2:]) == size
    assert_published(result, decoded)
    assert_published(model.encode(pixels(key, size[0]))[0], encoded)


def test_networks_of_one_structure_have_one_result() -> None:
    """Test that the published results hold for all models: the others differ in their weights alone."""
    structures = {
        key: {name: value for name, value in MODELS[key].published_config.items() if not name.startswith("latents_")}
        for key in MODELS
        if MODELS[key].vae_class.endswith("TinyVideoAutoencoder")
    }
    assert len(structures) == 10
    assert all(any(structure == structures[key] for key in PUBLISHED) for structure in structures.values())


def test_a_video_of_minimax_h3_may_end_within_a_clip() -> None:
    """Compare with the frames of a longer video, because each frame depends on those before it alone."""
    model, z = network("taeh3"), latents("taeh3", rows=1, columns=1)
    whole = model.decode(z)[0]
    for latent_frames, frames in ((1, 1), (3, 9), (5, 17), (6, 18)):
        part = model.decode(z[:, :, :latent_frames])[0]
        assert torch.equal(part, whole[:, :, :frames])
        assert MODELS["taeh3"].decoded_frames(latent_frames) == frames
    image = pixels("taeh3", 22)[:, :, :1]
    assert torch.equal(model.encode(image)[0], model.encode(pixels("taeh3", 22))[0][:, :, :1])


def test_memory_does_not_grow_with_the_video() -> None:
    with torch.device("meta"):
        model = TinyVideoAutoencoder.from_config({})

    def decoding(latent_frames: int) -> int:
        frames = torch.empty(1, 16, latent_frames, 12, 16, device="meta")
        with torch.no_grad():
            return peak_bytes(lambda: [None for _ in model.decode_frames(frames)])

    assert decoding(8) == pytest.approx(decoding(4), rel=0.01)


@pytest.fixture(scope="module")
def tiny_videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a server of some models, with files as they are published."""
    folder = tmp_path_factory.mktemp("tiny-videos")
    for key in SERVED:
        (folder / key).mkdir()
        save_file(network(key).state_dict(), folder / key / MODELS[key].file)
    with serve("--model", ",".join(SERVED), "--weights", str(folder), log=folder / "log") as url:
        yield Service(url, folder)


class TestService:
    """Tests over HTTP."""

    @pytest.mark.parametrize("key", ["taew2.1", "taecvx", "taeltx2", "taeh3"])
    def test_scaled_latents(self, tiny_videos: Service, key: str) -> None:
        model, scaled = network(key), {"do_scaling": True}
        batch, frames = latents(key, batch=2, rows=1, columns=2), PUBLISHED[key][0][0]
        sent = {**scaled, "normalized": True, "latents_layout": "BCFHW", "output_type": "pt"}
        if key == "taecvx":
            sent["num_frames"] = 13
        torch.testing.assert_close(tiny_videos.tensor(key, batch, "decode", **sent), model.decode(batch)[0])
        encoded = tiny_videos.tensor(key, pixels(key, frames, batch=2), "encode", **scaled)
        torch.testing.assert_close(encoded, model.encode(pixels(key, frames, batch=2))[0])

    def test_raw_latents_are_refused(self, tiny_videos: Service) -> None:
        """Test the range of the large VAE. LTX-2's own pipeline returns it, so its layout needs `normalized` too."""
        message = "this VAE takes and gives latents in the range of the diffusion model alone, not raw ones"
        for key in ("taew2.1", "taeltx2"):
            for sent in ({}, {"do_scaling": False}, {"scaling_factor": 0.5}, {"do_scaling": True, "shift_factor": 0.1}):
                assert message in tiny_videos.refusal(key, latents(key), "decode", output_type="pt", **sent)
            assert message in tiny_videos.refusal(key, pixels(key, 9), "encode")
        error = tiny_videos.refusal("taeltx2", latents("taeltx2"), "decode", do_scaling=True)
        assert "pipelines give BCFHW latents either denormalized or normalized" in error
        sent = {"do_scaling": True, "normalized": False}
        assert message in tiny_videos.refusal("taeltx2", latents("taeltx2"), "decode", **sent)

    def test_lighttae_takes_both(self, tiny_videos: Service) -> None:
        model, key = network("lighttaew2.2"), "lighttaew2.2"
        mean, std = (
            torch.tensor(MODELS[key].published_config[name]).view(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        expected = model.decode(latents(key))[0]
        raw = tiny_videos.tensor(key, latents(key), "decode", output_type="pt")
        scaled = (latents(key) - mean) / std
        torch.testing.assert_close(raw, expected)
        decoded = tiny_videos.tensor(key, scaled, "decode", output_type="pt", do_scaling=True)
        torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)
        encoded = tiny_videos.tensor(key, pixels(key, 9), "encode", do_scaling=True)
        torch.testing.assert_close(encoded * std + mean, model.encode(pixels(key, 9))[0], atol=1e-5, rtol=1e-5)

    def test_a_stream_has_every_frame(self, tiny_videos: Service) -> None:
        sent = {"output_type": "mp4", "do_scaling": True}
        plain = tiny_videos.post("taew2.1", latents("taew2.1", frames=5), "decode", **sent)
        streamed = tiny_videos.post("taew2.1", latents("taew2.1", frames=5), "decode", stream=True, **sent)
        assert frames_in(plain.content) == frames_in(streamed.content) == 17


def frames_in(video: bytes) -> int:
    with av.open(io.BytesIO(video)) as container:
        return sum(1 for _ in container.decode(video=0))


class TestWeights:
    """Tests of the file of a model, and of its errors."""

    def test_a_model_without_weights_on_the_hub_names_the_download(self) -> None:
        message = r"the weights of taeh3 are not on the Hub: download https://github.com/.*/taeh3.safetensors and name"
        with pytest.raises(FileNotFoundError, match=message):
            VAE.load(MODELS["taeh3"], "", Settings(model="taeh3"), "cpu")

    def test_a_file_of_another_network_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "taew2_2.safetensors"
        save_file(network("taew2.2").state_dict(), file)
        with pytest.raises(ValueError, match=r"taew2_2\.safetensors has the weights of another network than Taew21"):
            VAE.load(MODELS["taew2.1"], "", Settings(weights=str(file)), "cpu")
