"""The command line of the standalone server: one clear line when it cannot start."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.local_server import ROOT, clean_environment


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "no model was named (VAE_MODEL, or endpoint.json); the models are: sd-v1, sdxl, flux, hunyuan-video, tiny",
        ),
        (["--model", "sd3"], "there is no model 'sd3'; the models are: sd-v1, sdxl, flux, hunyuan-video, tiny"),
        (["--model", "sd-v1", "--dtype", "int8"], "VAE_DTYPE: Input should be 'float16', 'bfloat16' or 'float32'"),
        (["--model", "sd-v1", "--weights", "{empty}"], "VAE_WEIGHTS={empty} holds no AutoencoderKL"),
        (["--model", "sd-v1", "--weights", "random", "--device", "tpu9"], "VAE_DEVICE: torch cannot use 'tpu9' here"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    arguments = [argument.replace("{empty}", str(tmp_path)) for argument in arguments]
    result = subprocess.run(
        [sys.executable, "-m", "scripts.serve", *arguments],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: " + message.replace("{empty}", str(tmp_path)))
