"""Compile the kernels of `handlers.serving.vae.fast.kernels` as the fast pass starts them, without a GPU.

`python -m tests.support.compiled_kernels` prints a JSON object. For each kernel and compute capability it has the
registers and spilled bytes of a thread, and the widths of its loads and stores in bits.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from handlers.serving.vae.fast import kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


CHANNELS = {75: (256, 384), 80: (512, 96), 90: (128, 1024)}
"""Channels of an image and of a video, by compute capability."""
KERNELS = {name: value for name, value in vars(kernels).items() if isinstance(value, triton.JITFunction)}
Start = tuple[str, tuple[Any, ...], dict[str, Any]]
"""A kernel's name, its arguments and its constants."""


class Recorder:
    """Stand-in for a kernel of the module. It keeps the arguments of a start."""

    def __init__(self, name: str, starts: list[Start]) -> None:
        self.name, self.starts = name, starts

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *values, **constants: self.starts.append((self.name, values, constants))


def record(dtype: torch.dtype, image: int, video: int) -> list[Start]:
    """Return the starts of kernels for an image and a video of these channels, with arguments on the meta device."""
    starts: list[Start] = []
    recorders = {name: Recorder(name, starts) for name in KERNELS}
    with patch.multiple(kernels, **recorders), torch.device("meta"):
        x = kernels.channels_last(torch.empty(1, image, 1024, 1024, dtype=dtype))
        bias = torch.empty(image, dtype=dtype)
        kernels.group_norm(x, bias, bias, 32, 1e-6, input_bias=bias if image < 512 else None)
        kernels.add(x, bias.float(), x)
        kernels.interleave(torch.empty(1, 4 * image, 65, 65, dtype=dtype), bias)
        frames = torch.empty(1, video, 2, 480, 832, dtype=dtype)
        kernels.rms_norm(frames, torch.empty(video, dtype=dtype), None, video**0.5)
    return starts


def compile_start(start: Start, capability: int) -> dict[str, Any]:
    """Compile a kernel with what Triton knows of its arguments: tensors begin at a multiple of 16 bytes."""
    name, values, constants = start
    kernel, constants = KERNELS[name], dict(constants)
    warps = constants.pop("num_warps", 4)
    types = {name: _type(value) for name, value in zip(kernel.arg_names, values, strict=False)}
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, value in enumerate(values) if isinstance(value, Tensor)},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return facts(compiled.asm["cubin"], compiled.asm["ptx"])


def facts(cubin: bytes, ptx: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "spilled": int(stack) + int(local),
        "loads": list(_widths(ptx, "ld")),
        "stores": list(_widths(ptx, "st")),
    }


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i64" if abs(value) >= 2**31 else "i32"


def _widths(ptx: str, operation: str) -> Iterator[int]:
    for vector, bits in re.findall(rf"\b{operation}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", ptx):
        yield int(vector or 1) * int(bits)


def main() -> None:
    results = {}
    for capability, channels in CHANNELS.items():
        for start in record(torch.float16 if capability < 80 else torch.bfloat16, *channels):
            results[f"{capability} {start[0]} {start[2]}"] = compile_start(start, capability)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
