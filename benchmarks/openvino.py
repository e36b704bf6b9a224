"""The VAE in OpenVINO, which runs models of torch on Intel's and AMD's CPUs.

The package `openvino` is the benchmark's alone (requirements/bench.txt).
"""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import openvino
import torch
from torch import Tensor, nn

from benchmarks import forward
from benchmarks.forward import Size
from handlers.model import Task
from handlers.serving.vae.fast.check import fast_pass, half_pass
from handlers.serving.vae.fast.cpu import has_instructions
from handlers.serving.vae.vae import VAE

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
"""Names of precisions in OpenVINO, by dtype."""


class Call(nn.Module):
    """One task of an autoencoder as a module, which OpenVINO converts."""

    def __init__(self, model: Any, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, data: Tensor) -> Tensor:
        result = getattr(self.model, self.task)(data, return_dict=False)[0]
        return result if isinstance(result, Tensor) else result.mode()


def compare(key: str, plain: Any, vae: VAE, task: Task, size: Size, repeats: int) -> list[dict[str, Any]]:
    """Compare the fast pass with OpenVINO and diffusers by turns, in each dtype that the processor has."""
    data = forward.inputs(key, task, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's tracer warns of each comparison of sizes
        call = Call(convertible(plain), task).eval()
        converted = openvino.convert_model(call, example_input=forward.with_frames(plain, data))
    rows = []
    for dtype in PRECISIONS if has_instructions(torch.bfloat16) and task == "decode" else ("float32",):
        fast = fast_pass(vae.model) if dtype == "float32" else half_pass(vae.model)
        calls = {
            "diffusers": forward.plain_call(plain, task, data),
            "openvino": compiled(converted, PRECISIONS[dtype], forward.with_frames(plain, data)),
            "fast": forward.fast_call(fast, task, data) if fast else forward.plain_call(vae.model, task, data),
        }
        results = {name: call() for name, call in calls.items()}  # sets up what later calls use
        results["openvino"] = results["openvino"].view_as(results["diffusers"])  # an image, or a video of one frame
        times = forward.by_turns(calls, vae.device, repeats)
        rows.append(
            {
                "model": key,
                "task": task,
                "size": size,
                "dtype": dtype,
                "seconds": statistics.median(times["diffusers"]),
                "time_ratio": {name: min(times[name]) / min(times["diffusers"]) for name in ("openvino", "fast")},
                "psnr_db": {
                    name: forward.peak_signal_noise_ratio(results[name], results["diffusers"])
                    for name in ("openvino", "fast")
                },
            }
        )
    return rows


def convertible(model: Any) -> Any:
    """Return a copy with the upsamplings that OpenVINO knows. Both kinds are the same where sizes are doubled."""
    copied = deepcopy(model)
    for module in copied.modules():
        if getattr(module, "mode", None) == "nearest-exact":
            module.mode = "nearest"
    return copied


def compiled(model: Any, precision: str, data: Tensor) -> Callable[[], Tensor]:
    """Return a call of a model that OpenVINO has compiled for this CPU, with as many threads as torch."""
    logging.getLogger("openvino").setLevel(logging.ERROR)
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    network = openvino.Core().compile_model(model, "CPU", options)
    return lambda: torch.from_numpy(next(iter(network(data.numpy()).values())))
