"""Tests of `remote_vae.check` and the code that `make deploy` prints, against a real server."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
from PIL import Image

from handlers import MODELS
from handlers.model import Model
from remote_vae import check
from scripts import snippets
from tests.support import small_service
from tests.support.small_service import Service

SERVED = [key for key in MODELS if key in small_service.SERVED or key == "tiny"]
"""Models with a small checkpoint."""


def one_of_each(*names: str) -> list[str]:
    """Return the first model for each combination of these declarations and of the parameters that a client sends."""

    def describe(model: type[Model]) -> tuple:
        return tuple(getattr(model, name) for name in names), tuple(snippets.sent_parameters(model))

    return list({describe(MODELS[key]): key for key in reversed(SERVED)}.values())


@pytest.mark.parametrize("model", one_of_each("kind", "takes_scaled", "raw_layouts", "least_latent_frames"))
def test_check_with_each_kind_of_model(service: Service, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Check only shapes, because random weights do not reproduce the image."""
    monkeypatch.setattr(check, "MIN_PSNR", 0)
    monkeypatch.setattr(check, "SIZE", 64)
    result = check.check(f"{service.url}/{model}")

    assert result.shape[1] == MODELS[model].latent_channels
    assert result.shape[-1] == check.SIZE // MODELS[model].vae_scale_factor
    assert (result.psnr is None) == (MODELS[model].kind == "video")


@pytest.mark.filterwarnings("ignore:`do_scaling` is deprecated:FutureWarning")
@pytest.mark.parametrize("model", one_of_each("kind", "pixel_channels", "pipeline_layout", "clip"))
def test_the_printed_code_runs(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_ofTheTests")
    monkeypatch.setattr(snippets, "SIZE", 64)
    url, kind = f"{service.url}/{model}", MODELS[model].kind
    image = "decoded.jpg" if MODELS[model].pixel_channels == 3 else "decoded.png"
    for snippet, name in ((snippets.diffusers_snippet, image), (snippets.token_snippet, "decoded.png")):
        exec(snippet(MODELS[model], url), {})
        if kind == "video":
            name = "decoded.mp4"
            assert frames_in(Path(name)) == expected_frames(MODELS[model])
        else:
            with Image.open(name) as image:
                assert image.size == (64, 64)
        Path(name).unlink()


def test_the_printed_code_raises_the_error_of_the_service(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ofTheTests")
    with pytest.raises(RuntimeError, match=r"`shape` \[1, 4, 64, 64\] is no shape of this VAE's latents"):
        exec(snippets.token_snippet(MODELS["sd-v1"], f"{service.url}/flux"), {})


def expected_frames(model: type) -> int:
    """Return the number of frames that the printed code decodes."""
    return model.decoded_frames(snippets.latent_frames(model))


def frames_in(video: Path) -> int:
    with av.open(video) as container:
        return sum(1 for _ in container.decode(video=0))
