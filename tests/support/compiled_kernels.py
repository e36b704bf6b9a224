"""Compile the kernels of `handlers.serving.vae.fast.kernels` as the fast pass starts them, without a GPU.

`python -m tests.support.compiled_kernels [CAPABILITY ...]` prints a JSON object: for each kernel, its registers, spilled
bytes, and the widths in bits of its loads and stores of images.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from handlers.serving.vae.fast import kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


class Recorder:
    """Stand-in for a kernel of the module. It keeps the arguments of a start."""

    def __init__(self, name: str, starts: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.name, self.kernel, self.starts = name, getattr(kernels, name), starts

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *values, **constants: self.starts.append((self.name, self.kernel, values, constants))


def starts(dtype: torch.dtype) -> list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Return the kernels that the module starts for published sizes, with their arguments on the meta device."""
    recorded: list[Any] = []
    for name in [name for name, value in vars(kernels).items() if isinstance(value, triton.JITFunction)]:
        setattr(kernels, name, Recorder(name, recorded))
    with torch.device("meta"):
        for channels in (128, 512):
            x = kernels.channels_last(torch.empty(1, channels, 1024, 1024, dtype=dtype))
            bias = torch.empty(channels, dtype=dtype)
            kernels.group_norm(x, bias, bias, 32, 1e-6, input_bias=bias)
            kernels.add(x, bias.float(), x)
            kernels.interleave(torch.empty(1, 4 * channels, 65, 65, dtype=dtype), bias)
        kernels.group_norm(x, bias, bias, 32, 1e-6)
        for channels in (96, 384, 1024):
            x = torch.empty(1, channels, 2, 480, 832, dtype=dtype)
            kernels.rms_norm(x, torch.empty(channels, dtype=dtype), None, channels**0.5)
    return recorded


def compile_start(kernel: Any, values: tuple[Any, ...], constants: dict[str, Any], capability: int) -> dict[str, Any]:
    """Compile one start, with what Triton knows of its arguments: tensors begin at a multiple of 16 bytes."""
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


if __name__ == "__main__":
    results = {}
    for capability in map(int, sys.argv[1:]):
        for name, kernel, values, constants in starts(torch.float16 if capability < 80 else torch.bfloat16):
            label = f"{capability} {name} {constants}"
            results[label] = compile_start(kernel, values, constants, capability)
    print(json.dumps(results, indent=1))
