"""Tests of the sources of weights, and of the published architectures."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import utils as hub_utils
from huggingface_hub.errors import LocalEntryNotFoundError
from prometheus_client import REGISTRY
from safetensors.torch import load_file, save_file

from handlers import MODELS, fitting_models
from handlers.base import EndpointHandler
from handlers.model import WrongWeights
from handlers.serving.errors import RequestError
from handlers.serving.settings import Settings
from handlers.serving.vae.hub import Repository
from handlers.serving.vae.memory import Mode
from handlers.serving.vae.vae import VAE
from handlers.serving.vae.weights import find_class
from tests.support import checkpoints
from tests.support.endpoint import SMALL


def read_bias(vae: VAE) -> torch.Tensor:
    return vae.model.decoder.conv_in.bias


def test_an_explicit_folder_has_priority(checkpoint: Callable[[str], Path]) -> None:
    vae = VAE.load(MODELS["sd-v1"], str(checkpoint("sdxl")), Settings(weights=str(checkpoint("sd-v1"))), "cpu")
    assert vae.config.scaling_factor == 0.18215


@pytest.mark.parametrize("subfolder", [".", "vae"])
def test_the_mounted_repository_is_second(checkpoint: Callable[[str], Path], tmp_path: Path, subfolder: str) -> None:
    shutil.copytree(checkpoint("flux"), tmp_path / subfolder, dirs_exist_ok=True)
    vae = VAE.load(MODELS["flux"], str(tmp_path), Settings(), "cpu")
    assert vae.config.shift_factor == 0.1159


def test_the_checkpoint_is_third(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    class Custom(EndpointHandler):
        checkpoint = str(tmp_path)
        subfolder = "deep"
        vae_class = "AutoencoderKL"
        dtype = "float16"
        latent_channels = 4

    shutil.copytree(checkpoint("sdxl"), tmp_path / "deep")
    repository_without_vae = tmp_path / "repository"
    repository_without_vae.mkdir()
    (repository_without_vae / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert VAE.load(Custom, str(repository_without_vae), Settings(), "cpu").config.scaling_factor == 0.13025


def test_the_checkpoint_is_requested_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((OSError, LocalEntryNotFoundError), match="madebyollin/sdxl-vae-fp16-fix"):
        VAE.load(MODELS["sdxl"], str(tmp_path), Settings(), "cpu")
    # The session of this thread, which later tests would have, stays offline in older versions.
    (getattr(hub_utils, "reset_sessions", None) or hub_utils.close_session)()


class Small(MODELS["sd-v1"]):
    """A model whose published network is that of the small checkpoints."""

    published_config = {**MODELS["sd-v1"].published_config, **SMALL}


ORIGINAL = (
    (r"\.(down|up)_blocks\.(\d)\.resnets\.(\d)\.", r".\1.\2.block.\3."),
    (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.up\.(\d)\.", lambda match: f".up.{3 - int(match[1])}."),
    (r"\.mid_block\.resnets\.(\d)\.", lambda match: f".mid.block_{int(match[1]) + 1}."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)
"""Names in the files of Stable Diffusion's authors, and of Civitai, for diffusers' own."""


def to_original(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    original = {}
    for name, tensor in weights.items():
        for pattern, replacement in ORIGINAL:
            name = re.sub(pattern, replacement, name)
        is_attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        original[name] = tensor[..., None, None] if is_attention else tensor
    return original


class TestOwnWeights:
    """Tests of the files and folders that a user names, and of the errors of wrong ones."""

    @pytest.mark.parametrize("layout", ["diffusers", "original"])
    def test_a_single_file(self, checkpoint: Callable[[str], Path], tmp_path: Path, layout: str) -> None:
        folder, file = checkpoint("sd-v1"), tmp_path / "anime.safetensors"
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        save_file(weights if layout == "diffusers" else to_original(weights), file)
        vae = VAE.load(Small, "", Settings(weights=str(file)), "cpu")
        expected = VAE.load(MODELS["sd-v1"], "", Settings(weights=str(folder)), "cpu")
        state = expected.model.state_dict()
        assert vae.model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in vae.model.state_dict().items())
        assert vae.config.scaling_factor == 0.18215

    def test_a_single_file_of_a_deployed_repository(self, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
        """Test the name that `make deploy WEIGHTS=anime.safetensors` gives a file."""
        (tmp_path / "vae").mkdir()
        weights = load_file(checkpoint("sd-v1") / "diffusion_pytorch_model.safetensors")
        save_file(to_original(weights), tmp_path / "vae" / "vae.safetensors")
        vae = VAE.load(Small, str(tmp_path), Settings(), "cpu")
        assert torch.equal(vae.model.state_dict()["decoder.conv_in.weight"], weights["decoder.conv_in.weight"])

    def test_a_folder_of_another_model_names_those_that_it_fits(self, checkpoint: Callable[[str], Path]) -> None:
        for key, fitting in (
            ("flux", "they fit MODEL=sd3 or flux or "),
            ("hunyuan-video", "they fit MODEL=hunyuan-video"),
        ):
            with pytest.raises(WrongWeights) as caught:
                VAE.load(MODELS["sdxl"], "", Settings(weights=str(checkpoint(key))), "cpu")
            assert fitting in f"{caught.value}{fitting_models(caught.value)}"

    @pytest.mark.slow
    @pytest.mark.parametrize(("key", "other"), [("wan-2.1", "wan-2.1-2x"), ("wan-2.1-2x", "wan-2.1")])
    def test_a_decoder_of_another_size(self, tmp_path: Path, key: str, other: str) -> None:
        vae_class, config = checkpoints.SMALL[other]
        find_class(vae_class).from_config(config).save_pretrained(tmp_path)
        with pytest.raises(WrongWeights, match=rf"has upscale = {MODELS[other].upscale}$") as caught:
            VAE.load(MODELS[key], "", Settings(weights=str(tmp_path)), "cpu")
        assert fitting_models(caught.value) == f"; they fit MODEL={other}"

    @pytest.mark.parametrize("layout", ["diffusers", "original"])
    def test_a_file_of_another_network(self, checkpoint: Callable[[str], Path], tmp_path: Path, layout: str) -> None:
        weights, file = (
            load_file(checkpoint("flux") / "diffusion_pytorch_model.safetensors"),
            tmp_path / "x.safetensors",
        )
        save_file(weights if layout == "diffusers" else to_original(weights), file)
        with pytest.raises(
            WrongWeights, match=r"x\.safetensors has the weights of another network than Small"
        ) as caught:
            VAE.load(Small, "", Settings(weights=str(file)), "cpu")
        assert "they fit MODEL=sd3 or flux or " in fitting_models(caught.value)

    def test_files_that_are_no_weights(self, tmp_path: Path) -> None:
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(b"no weights at all")
        with pytest.raises(OSError, match=r"broken\.safetensors is no \.safetensors file"):
            VAE.load(Small, "", Settings(weights=str(broken)), "cpu")
        for name in (tmp_path / "missing.safetensors", "not/a/name"):
            with pytest.raises(FileNotFoundError, match=r"name a folder that has, a \.safetensors file, or org/repo"):
                VAE.load(Small, "", Settings(weights=str(name)), "cpu")

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("org/repo", ("org/repo", None, None)),
            ("org/my.repo:vae/deep@main", ("org/my.repo", "vae/deep", "main")),
            ("org/repo@0123abc", ("org/repo", None, "0123abc")),
            ("org/repo:anime.safetensors", ("org/repo", "anime.safetensors", None)),
            ("folder", None),
            ("./org/repo", None),
            ("/org/repo", None),
        ],
    )
    def test_names_on_the_hub(self, text: str, parts: tuple[str | None, ...] | None) -> None:
        assert Repository.parse(text) == (Repository(*parts) if parts else None)


def test_an_older_diffusers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers 0.37 would read the config of FLUX.2's small decoder, and ignore the entry that it does not know."""
    monkeypatch.setattr("diffusers.__version__", "0.37.1")
    with pytest.raises(
        ValueError, match=r"flux2-small needs diffusers 0\.38 or later, and this is 0\.37\.1; `pip install"
    ):
        VAE.load(MODELS["flux2-small"], "", Settings(model="flux2-small", weights="random"), "cpu")


def test_a_folder_without_a_vae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"VAE_WEIGHTS=.* has no AutoencoderKL"):
        VAE.load(MODELS["sd-v1"], "", Settings(weights=str(tmp_path)), "cpu")


def test_pickled_weights_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copy(checkpoint("sd-v1") / "config.json", tmp_path)
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        VAE.load(MODELS["sd-v1"], "", Settings(weights=str(tmp_path)), "cpu")


def test_device_and_dtype(checkpoint: Callable[[str], Path]) -> None:
    weights = str(checkpoint("flux"))
    assert VAE.load(MODELS["flux"], "", Settings(weights=weights), "cpu").dtype == torch.float32
    vae = VAE.load(MODELS["flux"], "", Settings(weights=weights, dtype="bfloat16"), "cpu")
    assert vae.dtype == torch.bfloat16
    decoded, _ = vae.decode(torch.zeros(1, 16, 2, 2))
    assert decoded.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "latents", "pixels"),
    [("flux", (1, 16, 1, 2), (1, 3, 8, 16)), ("hunyuan-video", (1, 16, 2, 1, 2), (1, 3, 5, 8, 16))],
)
def test_a_published_architecture_with_random_weights(
    key: str, latents: tuple[int, ...], pixels: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    vae = VAE.load(MODELS[key], "", Settings(weights="random"), "cpu")
    assert "RANDOM" in caplog.text
    decoded, _ = vae.decode(torch.zeros(latents))
    assert decoded.shape == pixels
    assert decoded.isfinite().all()


def test_random_weights_are_reproducible() -> None:
    first, second = (VAE.load(MODELS["tiny"], "", Settings(weights="random"), "cpu") for _ in range(2))
    assert torch.equal(read_bias(first), read_bias(second))


class TestOverflow:
    """Tests of weights that exceed the range of float16, but not of float32, as the first VAE of SDXL does."""

    @pytest.fixture
    def vae(self, checkpoint: Callable[[str], Path]) -> VAE:
        vae = VAE.load(MODELS["sdxl"], "", Settings(weights=str(checkpoint("sdxl")), dtype="float16"), "cpu")
        for coder in (vae.model.encoder, vae.model.decoder):
            coder.conv_in.weight.fill_(30_000.0)  # a group norm follows
        return vae

    @pytest.mark.parametrize(("task", "shape"), [("decode", (1, 4, 8, 8)), ("encode", (1, 3, 64, 64))])
    def test_an_overflow_runs_again_in_float32(self, vae: VAE, task: str, shape: tuple[int, ...]) -> None:
        inputs = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 1
        half = getattr(vae.model, task)(inputs.half(), return_dict=False)[0]
        assert not (half if task == "decode" else half.mode()).isfinite().all()
        before = REGISTRY.get_sample_value("vae_upcast_total")
        result, mode = getattr(vae, task)(inputs)
        assert REGISTRY.get_sample_value("vae_upcast_total") == before + 1
        assert (result.dtype, mode) == (torch.float16, Mode.FULL)
        assert vae.model.dtype == torch.float16
        exact = getattr(vae.model.float(), task)(inputs.half().float(), return_dict=False)[0]
        exact = exact if task == "decode" else exact.mode()
        torch.testing.assert_close(result.float(), exact, atol=1e-2, rtol=1e-3)

    def test_a_missing_kernel_runs_again_in_float32(self, vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
        decode = vae.model.decode

        def without_half(latents: torch.Tensor, **options: object) -> object:
            if latents.dtype == torch.float16:
                # the error of torch 2.5 on a CPU
                raise RuntimeError("\"replication_pad3d\" not implemented for 'Half'")
            return decode(latents, **options)

        monkeypatch.setattr(vae.model, "decode", without_half)
        result, mode = vae.decode(torch.rand(1, 4, 8, 8))
        assert (result.dtype, mode) == (torch.float16, Mode.FULL)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_one_infinite_channel_in_float32_is_an_error(self, vae: VAE, value: float) -> None:
        vae.model.decoder.conv_out.bias[1] = value
        with pytest.raises(
            RequestError, match="gives NaN or infinity for this decode request, even in float32"
        ) as refused:
            vae.decode(torch.ones(1, 4, 8, 8))
        assert refused.value.status == 422
        assert vae.model.dtype == torch.float16
