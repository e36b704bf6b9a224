"""Tests of adding a model as docs/models.md describes it: from its blocks of code to a served image."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.utils.remote_utils import remote_decode

from scripts import local_server
from scripts.local_server import ROOT, serve
from tests.support import forked
from tests.support.project_copy import copy_project

pytestmark = pytest.mark.slow

ADDING = (ROOT / "docs" / "models.md").read_text().partition("## Adding one")[2]
FILE = re.search(r"`(handlers/\w+\.py)`", ADDING)[1]
(CLASS,) = re.findall(r"```python\n(.*?)```", ADDING, re.DOTALL)
LINES, ROW = re.findall(r"```diff\n(.*?)```", ADDING, re.DOTALL)
KEY = re.search(r"`make serve MODEL=(\S+)`", ADDING)[1]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the project and add the model."""
    project = copy_project(tmp_path)
    (project / "endpoint.json").unlink()
    (project / FILE).write_text(CLASS)
    registry = project / "handlers" / "__init__.py"
    code = registry.read_text().splitlines(keepends=True)
    for line in LINES.splitlines(keepends=True):
        if line.startswith(" "):
            assert line[1:] in code  # the line exists already
        else:
            follows = r"from handlers\." if "import" in line else r"MODELS: "
            index = max(number for number, line_of_code in enumerate(code) if re.match(follows, line_of_code))
            code.insert(index + 1, line[1:])
    registry.write_text("".join(code))
    monkeypatch.setattr(local_server, "ROOT", project)
    return project


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Save a checkpoint of the upscaler's shape with few channels: three blocks, so 4 pixels a latent."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        scaling_factor=0.08333,
    )
    vae.save_pretrained(tmp_path / "checkpoint" / "vae")
    return tmp_path / "checkpoint"


def declare(project: Path, old: str, new: str) -> None:
    code = (project / FILE).read_text()
    assert old in code
    (project / FILE).write_text(code.replace(old, new))


def served(project: Path, *arguments: str) -> str:
    """Return the output of `make serve` for settings that make it end."""
    _, _, stderr = forked.run("-m", "scripts.serve", "--model", KEY, *arguments, folder=project)
    return stderr


def assert_decodes(weights: Path, tmp_path: Path) -> None:
    """Check that the server returns the VAE's own result for scaled latents to the client of diffusers."""
    latents = torch.randn(1, 4, 24, 16) * 0.1
    with serve("--model", KEY, "--weights", str(weights), log=tmp_path / "log") as url:
        decoded = remote_decode(url, latents, scaling_factor=0.08333, output_type="pt", return_type="pt")
        image = remote_decode(url, latents, scaling_factor=0.08333)
    vae = AutoencoderKL.from_pretrained(weights / "vae")
    with torch.no_grad():
        torch.testing.assert_close(decoded, vae.decode(latents / 0.08333).sample)
    assert image.size == (64, 96)


@pytest.mark.usefixtures("project")
def test_the_documented_model_decodes_an_image(weights: Path, tmp_path: Path) -> None:
    assert_decodes(weights, tmp_path)


def test_the_documented_model_is_listed(project: Path) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout

    assert re.search(rf"^{KEY} +\[B, 4, H/4, W/4\] +do_scaling ", run("scripts.models"), re.MULTILINE)


def test_the_tests_of_models_succeed_with_the_documented_model(project: Path) -> None:
    """Run the tests that go through the models."""
    for name in ("tests", "docs", "clients", "benchmarks"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, project)
    readme, table = project / "README.md", project / "docs" / "models.md"
    readme.write_text(readme.read_text().replace("`sd-v1` ", f"`sd-v1` `{KEY}` ", 1))
    table.write_text(table.read_text().replace("| `sd-v1` |", f"{ROW[1:]}| `sd-v1` |", 1))

    expression = "key or every_model or models_table or printed_models"
    files = ("tests/test_models.py", "tests/test_readme.py")
    status, stdout, _ = forked.run("-m", "pytest", "--assert=plain", "-qk", expression, *files, folder=project)
    assert status == 0, stdout
    assert re.search(r"^([6-9]|\d\d) passed", stdout, re.MULTILINE)


def test_a_wrong_declaration_is_an_error_with_both_values(project: Path, weights: Path) -> None:
    (shown,) = re.findall(r"`(X4Upscaler declares .*?)`", ADDING)
    declare(project, '"stabilityai/stable-diffusion-x4-upscaler"', f'"{weights}"')
    declare(project, "    vae_scale_factor = 4\n", "")
    assert served(project).splitlines()[-1] == f"error: {shown}"

    declare(project, "    latent_channels = 4\n", "    vae_scale_factor = 4\n")
    message = "declares latent_channels = None, but its AutoencoderKL has latent_channels = 4"
    assert re.fullmatch(rf"error: \w+ {message}", served(project).splitlines()[-1])


def test_a_missing_declaration_is_an_error(project: Path) -> None:
    declare(project, '    dtype = "float32"\n    latent_channels = 4\n', "")
    last = "x4-upscaler does not declare {}; handlers/model.py says what that is"
    assert served(project).splitlines() == [f"error: {last.format('dtype')}"]


def test_an_unknown_class_of_diffusers_is_an_error(project: Path, weights: Path, tmp_path: Path) -> None:
    named = re.search(r"`(vae_class = .*?)`", ADDING)[1]
    declare(project, 'vae_class = "AutoencoderKL"', named)
    module, _, name = named.split('"')[1].partition(":")
    code = f"from diffusers import AutoencoderKL\n\n\nclass {name}(AutoencoderKL):\n    pass\n"
    (project / module.replace(".", "/")).with_suffix(".py").write_text(code)
    config = weights / "vae" / "config.json"
    config.write_text(config.read_text().replace('"AutoencoderKL"', f'"{name}"'))

    assert_decodes(weights, tmp_path)

    declare(project, name, "Other")
    assert served(project, "--weights", str(weights)).splitlines()[-1] == f"error: {module} has no Other"
