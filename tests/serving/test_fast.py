"""Tests of the fast pass: it gives diffusers' results, and runs only if a check on the device found it correct and
faster.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from torch import Tensor

from benchmarks.peak import peak_bytes
from handlers import MODELS
from handlers.serving.errors import RequestError
from handlers.serving.media.output import describe, tensor_bytes
from handlers.serving.pipeline import Pipeline
from handlers.serving.settings import Settings
from handlers.serving.vae import blocks as coders
from handlers.serving.vae.autoencoder import DecodeOptions, EncodeOptions, has_frames
from handlers.serving.vae.chunks import decode_chunks, join
from handlers.serving.vae.fast import check as fast_check
from handlers.serving.vae.fast import cpu, winograd
from handlers.serving.vae.fast.check import FastPasses, fast_pass
from handlers.serving.vae.fast.cpu import CpuPass
from handlers.serving.vae.fast.forward import FastPass
from handlers.serving.vae.fast.fused import fused_pass
from handlers.serving.vae.memory import Mode
from handlers.serving.vae.stop import stoppable
from handlers.serving.vae.vae import VAE
from scripts.local_server import serve, wait_until_checked
from tests.support.checkpoints import build
from tests.support.messages import send
from tests.support.small_service import as_tensor

pytestmark = pytest.mark.slow

CASES = [("sd-v1", None), ("wan-2.1", 3), ("hunyuan-video", 3)]
"""A model of each architecture, and numbers of latent frames."""
ONE_FRAME = [("qwen-image", 1), ("hunyuan-video", 1)]
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
"""Device of the kernels. conftest.py has Triton interpret them unless the environment says otherwise."""

IMAGE, VIDEO = (5, 7), (3, 5)
"""Height and width of latents. A processor without instructions for float16 takes seconds for larger videos."""
small = cache(build)


def inputs(key: str, frames: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a batch of two, with sides that are neither even nor equal."""
    model, generator = MODELS[key], torch.Generator().manual_seed(0)
    sides = VIDEO if frames else IMAGE
    latents = torch.randn(2, model.latent_channels, *([frames] if frames else []), *sides, generator=generator)
    sides = [size * model.vae_scale_factor for size in sides]
    video = [(frames - 1) * model.frame_factor + 1] if frames else []
    pixels = torch.rand(2, 3, *video, *sides, generator=generator) * 2 - 1
    return {"decode": latents.to(dtype), "encode": pixels.to(dtype)}


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    encoded = model.encode(inputs["encode"], return_dict=False)[0]
    return {"decode": join(decode_chunks(model, inputs["decode"])), "encode": getattr(encoded, "parameters", encoded)}


def both(key: str, frames: int | None, dtype: torch.dtype, fast_class: type[FastPass] = FastPass) -> Any:
    """Return the results of diffusers and of the fast pass for each task."""
    device = DEVICE if fast_class is fused_pass else "cpu"
    model = deepcopy(small(key)).to(device, dtype)
    fast, tensors = fast_class(model), {task: tensor.to(device) for task, tensor in inputs(key, frames, dtype).items()}
    fast.prepare()
    own = outputs(model, tensors)
    with fast.installed():
        result = outputs(model, tensors)
    if dtype == torch.float64:  # the fast pass leaves no trace
        assert_equal(outputs(model, tensors), own)
    return own, result


def errors(
    key: str, frames: int | None, dtype: torch.dtype, fast_class: type[FastPass]
) -> Iterator[tuple[float, float]]:
    """Yield the errors of the fast pass and of diffusers, against diffusers in float64, for each task."""
    own, result = both(key, frames, dtype, fast_class)
    tensors = {task: tensor.to(own[task].device).double() for task, tensor in inputs(key, frames, dtype).items()}
    exact = outputs(deepcopy(small(key)).to(tensors["decode"].device, dtype).double(), tensors)
    for task in own:
        assert result[task].dtype == dtype
        yield error(result[task], exact[task]), error(own[task], exact[task])


def assert_equal(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for task in result:
        assert torch.equal(result[task], expected[task]), task


def error(result: Tensor, exact: Tensor) -> float:
    return (result.double() - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("fast_class", [FastPass, CpuPass])
@pytest.mark.parametrize(("key", "frames"), [*CASES, *ONE_FRAME])
def test_the_fast_pass_is_the_same_algebra(
    key: str, frames: int | None, fast_class: type[FastPass], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test with Winograd's convolutions for all 3x3 kernels, as small models have few channels and pixels."""
    monkeypatch.setattr(winograd, "is_faster", lambda weight, pixels=0: weight.shape[-2:] == (3, 3))
    own, result = both(key, frames, torch.float64, fast_class)
    for task in own:  # Wan's upsampling goes through float32 in diffusers
        tolerance = 1e-6 if task == "decode" and coders.is_causal(coders.coders_of(small(key))) else 1e-12
        torch.testing.assert_close(result[task], own[task], atol=tolerance * own[task].abs().max().item(), rtol=0)


@pytest.mark.parametrize(("key", "frames"), CASES)
@pytest.mark.parametrize(("fast_class", "dtype"), [(FastPass, torch.float16), (CpuPass, torch.bfloat16)])
def test_the_fast_pass_is_as_exact_as_diffusers(
    key: str, frames: int | None, dtype: torch.dtype, fast_class: type[FastPass]
) -> None:
    """Test each pass in the dtype in which servers without Triton use it: a GPU's, and a processor's."""
    for fast, plain in errors(key, frames, dtype, fast_class):
        assert fast <= 1.2 * plain  # few channels average little; the check at load allows 0.5 dB at published sizes


@pytest.mark.parametrize(("key", "frames"), [("wan-2.1", 3), ("wan-2.2", 3), ("qwen-image", 1)])
def test_wan_without_folding_equals_diffusers_bit_for_bit(key: str, frames: int) -> None:
    model, tensors = small(key), inputs(key, frames, torch.float32)
    own = outputs(model, tensors)
    with FastPass(model, fold=False).installed():
        assert_equal(outputs(model, tensors), own)


@pytest.mark.parametrize(("key", "frames"), [("sd-v1", None), ("wan-2.1", 2)])
def test_the_kernels_are_as_exact_as_diffusers(key: str, frames: int | None) -> None:
    # Triton's interpreter truncates bfloat16 where hardware rounds
    dtype = torch.float16 if DEVICE == "cpu" else torch.bfloat16
    for fast, plain in errors(key, frames, dtype, fused_pass):
        assert fast <= 1.2 * plain


@pytest.mark.parametrize("fast_class", [FastPass, CpuPass])
@pytest.mark.parametrize("key", ["sd-v1", "wan-2.1", "hunyuan-video"])
def test_the_fast_pass_takes_no_more_memory_than_diffusers(key: str, fast_class: type[FastPass]) -> None:
    model = small(key)
    fast, tensors = fast_class(model), inputs(key, 3 if has_frames(model) else None, torch.float32)
    assert fast._folded  # made once, for the first decode
    own = peak_bytes(lambda: outputs(model, tensors))
    with fast.installed():
        assert peak_bytes(lambda: outputs(model, tensors)) <= own


def test_other_architectures_have_no_fast_pass() -> None:
    assert fast_pass(small("taesd")) is None
    passes = FastPasses(small("taesd"), MODELS["taesd"], wanted=True)
    assert set(passes.verdicts.values()) == {"off: this architecture has none"}
    assert list(passes.check()) == []


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a check run quickly, with one measurement of each pass."""
    monkeypatch.setattr(fast_check, "SMALL", 32)
    monkeypatch.setattr(fast_check, "LARGEST_ON_CPU", 64)
    monkeypatch.setattr(fast_check, "MOST_TURNS", 1)


@pytest.fixture
def vae() -> VAE:
    return VAE(deepcopy(small("sd-v1")), MODELS["sd-v1"], fast=True)


def run_checks(vae: VAE, monkeypatch: pytest.MonkeyPatch, ratio: float = 0.5) -> dict[str, str]:
    """Run the check as if the fast pass took `ratio` of the time of diffusers'."""
    compare = FastPasses._compare

    def as_if(*arguments: Any) -> Any:
        own, result, _ = yield from compare(*arguments)
        return own, result, ratio

    monkeypatch.setattr(FastPasses, "_compare", as_if)
    vae.fast.prepare()
    for _ in vae.fast.check():
        pass
    return vae.fast.verdicts


def modes(vae: VAE, exact: bool = False) -> list[Mode]:
    tensors = inputs("sd-v1", None, vae.dtype)
    return [
        vae.decode(tensors["decode"], options=DecodeOptions(exact=exact))[1],
        vae.encode(tensors["encode"], EncodeOptions(exact=exact))[1],
    ]


def test_a_correct_and_faster_pass_is_used(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(vae.fast.verdicts.values()) == {"off: not checked yet"}
    assert modes(vae) == [Mode.FULL, Mode.FULL]
    verdicts = run_checks(vae, monkeypatch)
    assert all(verdict.startswith("on: 0.50 of diffusers' time at 64x64, ") for verdict in verdicts.values())
    assert modes(vae) == [Mode.FAST, Mode.FAST]
    assert modes(vae, exact=True) == [Mode.FULL, Mode.FULL]


def test_the_check_decodes_whole_images_after_a_request_in_tiles(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    vae.model.use_tiling = True
    monkeypatch.setattr(vae.model, "tiled_decode", None)
    monkeypatch.setattr(vae.model, "tile_latent_min_size", 2)
    assert run_checks(vae, monkeypatch)["decode"].startswith("on: ")


def test_a_slower_pass_is_not_used(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = run_checks(vae, monkeypatch, ratio=1.5)
    assert all(verdict.startswith("off: 1.50 of diffusers' time at 64x64") for verdict in verdicts.values())
    assert modes(vae) == [Mode.FULL, Mode.FULL]


def test_a_wrong_pass_is_not_used(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    for folded in vae.fast.candidates["decode"][0]._folded.values():
        folded[0][1].mul_(1.01)
    verdicts = run_checks(vae, monkeypatch)
    assert "dB further from exact than diffusers at 32x32" in verdicts["decode"]
    assert verdicts["encode"].startswith("on: ")  # a FastPass that folds nothing
    assert modes(vae) == [Mode.FULL, Mode.FAST]


@pytest.mark.parametrize("method", ["prepare", "_residual"])
def test_a_failing_pass_is_not_used(vae: VAE, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(vae.fast.candidates["decode"][0], method, fail)
    verdicts = run_checks(vae, monkeypatch)
    assert set(verdicts.values()) == {"off: RuntimeError: no compiler here"}
    assert modes(vae) == [Mode.FULL, Mode.FULL]


def test_an_overflow_runs_in_float32(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    run_checks(vae, monkeypatch)
    assert vae.fast.used("decode")
    vae.model.double()  # as a request does that overflows in half precision
    assert not vae.fast.used("decode")


def test_larger_images_than_the_pass_takes_run_in_diffusers(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    run_checks(vae, monkeypatch)
    fast = vae.fast.used("decode")
    fast.most_pixels = math.prod(IMAGE) * 64
    assert modes(vae) == [Mode.FAST, Mode.FAST]
    fast.most_pixels -= 1
    assert modes(vae) == [Mode.FULL, Mode.FULL]


def test_exact_is_refused_if_it_does_not_fit(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handlers.serving.vae.heap.HEAP.capacity", lambda: 1000)
    with pytest.raises(
        RequestError, match=r"in diffusers' own pass, .*; without `exact` \(or VAE_EXACT\) it may take less"
    ) as caught:
        modes(vae, exact=True)
    assert caught.value.status == 422


def test_exact_is_refused_for_a_batch_that_diffusers_cannot_run() -> None:
    class OneByOne(MODELS["sd-v1"]):
        runs_batches = False

    vae = VAE(small("sd-v1"), OneByOne)
    assert modes(vae) == [Mode.SLICED, Mode.SLICED]
    with pytest.raises(RequestError, match="`exact`: diffusers runs no batch through this model; send one at a time"):
        modes(vae, exact=True)


def test_the_settings_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_FAST", "1")
    assert Settings.load().fast
    monkeypatch.setenv("VAE_EXACT", "1")
    with pytest.raises(ValueError, match="VAE_FAST and VAE_EXACT: only one can be on"):
        Settings.load()


def test_requests_are_served_before_and_after_the_check(vae: VAE) -> None:
    pipeline = Pipeline([vae], Settings(fast=True))
    pipeline.check_fast_passes()
    latents = inputs("sd-v1", None, torch.float32)["decode"]
    own = send(pipeline, latents, output_type="pt", exact=True)
    deadline = 10
    while "off: not checked yet" in vae.fast.verdicts.values() and deadline:
        torch.testing.assert_close(send(pipeline, latents, output_type="pt"), own, atol=1e-4, rtol=0)
        deadline -= 1
    torch.testing.assert_close(send(pipeline, latents, output_type="pt"), own, atol=1e-4, rtol=0)


def test_a_copy_of_the_model_is_independent() -> None:
    model = small("sd-v1")
    with FastPass(model).installed():
        pass
    assert not [name for name, module in deepcopy(model).named_modules() if "forward" in vars(module)]


def test_a_large_mean_takes_no_digits() -> None:
    norm = torch.nn.GroupNorm(4, 16)
    x = (torch.randn(2, 16, 64, 64) + 50).contiguous(memory_format=torch.channels_last)
    result = CpuPass(small("sd-v1"))._normalize(norm, torch.nn.Identity(), x)
    torch.testing.assert_close(result.double(), deepcopy(norm).double()(x.double()), atol=2e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [8, 33, 64])
def test_a_variance_that_overflows_gives_no_values(side: int, dtype: torch.dtype) -> None:
    """Test that the service refuses such a request. diffusers' own result is NaN too, or a constant: a gray image."""
    norm = torch.nn.GroupNorm(4, 16, eps=1e-6).to(dtype)
    torch.nn.init.normal_(norm.bias)
    noise = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    finite = []
    for exponent in range(16, 39):
        x = (noise * 10.0**exponent).to(dtype)
        result = CpuPass(small("sd-v1"))._normalize(
            norm, torch.nn.Identity(), x.contiguous(memory_format=torch.channels_last)
        )
        finite.append(bool(result.isfinite().all()))
        if finite[-1]:
            torch.testing.assert_close(result, norm(x))
    assert finite[0]
    assert not finite[-1]


@pytest.fixture
def half() -> VAE:
    """Return a VAE that decodes in bfloat16, as on a processor that has instructions for it."""
    model = deepcopy(small("sd-v1"))
    model.decoder.conv_out.weight.data.mul_(0.2)  # eight channels average little: 43 dB without this
    return VAE(model, MODELS["sd-v1"], fast=True, bfloat16=True)


def test_a_processor_with_bfloat16_decodes_in_it_and_encodes_in_float32(
    half: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, options = inputs("sd-v1", None, torch.float32), DecodeOptions(exact=True)
    own = outputs(half.model, tensors)
    assert modes(half) == [Mode.FULL, Mode.FULL]
    verdicts = run_checks(half, monkeypatch)
    assert re.fullmatch(
        "on: 0.50 of diffusers' time at 64x64, in bfloat16, [4-9][0-9] dB PSNR from float32", verdicts["decode"]
    )
    assert "bfloat16" not in verdicts["encode"]
    assert modes(half) == [Mode.FAST, Mode.FAST]
    decoded = half.decode(tensors["decode"])[0]
    assert decoded.dtype == torch.float32
    assert not torch.allclose(decoded, own["decode"], atol=1e-4)
    assert (decoded - own["decode"]).abs().mean() < 0.01
    assert torch.equal(half.decode(tensors["decode"], options=options)[0], own["decode"])
    torch.testing.assert_close(half.encode(tensors["encode"])[0], own["encode"][:, :4], atol=1e-5, rtol=0)


def test_the_bfloat16_pass_takes_the_memory_of_bfloat16(half: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 4, 64, 64)
    before = half._estimate("decode", shape).needed(Mode.FAST, 1)
    run_checks(half, monkeypatch)
    estimate = half._estimate("decode", shape)
    assert before == estimate.needed(Mode.FULL, 1)
    assert estimate.fast == estimate.full / 2


def test_an_inaccurate_bfloat16_pass_gives_way_to_float32(half: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    half.fast.candidates["decode"][0].model.decoder.conv_in.weight.data.mul_(2)
    assert "bfloat16" not in run_checks(half, monkeypatch)["decode"]
    assert modes(half) == [Mode.FAST, Mode.FAST]
    assert half.fast.used("decode").dtype == torch.float32


def test_an_architecture_without_a_fast_pass_decodes_in_bfloat16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = VAE(deepcopy(small("taesd")), MODELS["taesd"], fast=True, bfloat16=True)
    verdicts = run_checks(vae, monkeypatch)
    assert verdicts["decode"].startswith("on: ")
    assert verdicts["encode"] == "off: this architecture has none"
    assert vae.model.encoder is vae.fast.used("decode").model.encoder


@pytest.mark.parametrize(
    ("line", "bfloat16", "float16"),
    [
        ("flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 avx512_vnni", True, False),
        ("flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile avx512_fp16", True, True),
        ("flags\t\t: fpu sse2 avx2 fma", False, False),
        ("Features\t: fp asimd fphp asimdhp bf16", True, True),
        ("Features\t: fp asimd", False, False),
        ("processor\t: 0", False, False),
    ],
)
def test_instructions_of_processors(
    line: str, bfloat16: bool, float16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "CPU_INFO", tmp_path / "cpuinfo")
    assert not cpu.has_instructions(torch.bfloat16)  # another system
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\nbugs\t\t: spectre_v1\n\nprocessor\t: 1\n{line}\n")
    assert cpu.has_instructions(torch.bfloat16) == bfloat16
    assert cpu.has_instructions(torch.float16) == float16


@pytest.mark.parametrize(
    ("settings", "has_bfloat16", "decode", "encode"),
    [
        ({}, True, [torch.bfloat16, torch.float32], [torch.float32]),
        ({}, False, [torch.float32], [torch.float32]),
        ({"fast": True}, True, [torch.bfloat16, torch.float32], [torch.float32]),
        ({"fast": False}, True, [], []),
        ({"exact": True}, True, [], []),
        ({"dtype": "float32"}, True, [], []),
        ({"dtype": "float32", "fast": True}, True, [torch.float32], [torch.float32]),
        ({"dtype": "bfloat16", "fast": True}, True, [torch.bfloat16], [torch.bfloat16]),
    ],
)
def test_the_settings_choose_the_fast_passes_on_a_cpu(
    settings: dict[str, Any],
    has_bfloat16: bool,
    decode: list[torch.dtype],
    encode: list[torch.dtype],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small("sd-v1").save_pretrained(tmp_path)
    monkeypatch.setattr("handlers.serving.vae.vae.has_instructions", lambda dtype: has_bfloat16)
    vae = VAE.load(MODELS["sd-v1"], "", Settings(weights=str(tmp_path), **settings), "cpu")
    candidates = {task: [fast.dtype for fast in passes] for task, passes in vae.fast.candidates.items()}
    assert candidates == {"decode": decode, "encode": encode}
    assert vae.fast.verdicts["decode"] == ("off: not checked yet" if decode else "off: VAE_FAST is not set")


def test_a_slow_float16_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small("sd-v1").save_pretrained(tmp_path)
    for has_float16 in (True, False):
        monkeypatch.setattr("handlers.serving.vae.vae.has_instructions", lambda dtype, has=has_float16: has)
        VAE.load(MODELS["sd-v1"], "", Settings(weights=str(tmp_path), dtype="float16"), "cpu")
        assert ("no instructions for float16" in caplog.text) == (not has_float16)


def test_a_request_stops_the_check_which_goes_on_later(vae: VAE) -> None:
    steps, stops = vae.fast.check(), iter([False, True, True])
    for _ in range(4):
        with stoppable(lambda: next(stops, False)):
            next(steps)
        assert modes(vae) == [Mode.FULL, Mode.FULL]
    assert next(stops, None) is None
    list(steps)
    assert all("dB" in verdict for verdict in vae.fast.verdicts.values())


def test_a_check_that_does_not_fit_in_memory_leaves_diffusers_pass(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handlers.serving.vae.heap.HEAP.available", lambda: 1000)
    list(vae.fast.check())
    assert all("which this device does not have free now" in verdict for verdict in vae.fast.verdicts.values())


def test_the_default_of_a_server_on_a_cpu(tmp_path: Path) -> None:
    """A server uses its fast pass after the check. `exact` gives diffusers' own bits."""
    model, latents = small("sd-v1"), inputs("sd-v1", None, torch.float32)["decode"]
    model.save_pretrained(tmp_path)
    own = outputs(model, inputs("sd-v1", None, torch.float32))["decode"]
    command = ("--model", "sd-v1", "--weights", str(tmp_path))
    with serve(*command, log=tmp_path / "log", VAE_FAST="") as url:
        wait_until_checked(url)
        if requests.get(f"{url}/config", timeout=60).json()["fast"]["decode"].startswith("on"):
            assert post(url, latents).headers["X-VAE-Mode"] == "fast"
        torch.testing.assert_close(as_tensor(post(url, latents)), own, atol=0.02, rtol=0)
        assert torch.equal(as_tensor(post(url, latents, exact="true")), own)


def post(url: str, latents: Tensor, **parameters: str) -> requests.Response:
    shape, dtype = describe(latents)
    return requests.post(
        f"{url}/decode",
        data=tensor_bytes(latents),
        params={"shape": shape, "dtype": dtype, "output_type": "pt", **parameters},
        headers={"Content-Type": "tensor/binary"},
        timeout=60,
    )
