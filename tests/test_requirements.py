import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def names(file: str) -> dict[str, str]:
    """Return package and version of each line of a requirements file."""
    lines = re.findall(r"^([\w-]+)(?:\[\w+\])?([<>=].*)?$", (ROOT / file).read_text(), re.MULTILINE)
    return {name.lower(): bounds for name, bounds in lines}


def test_packages_outside_the_image_have_an_upper_bound() -> None:
    """Test the packages that an endpoint installs again at each start."""
    preinstalled = names("requirements/toolkit-image.txt").keys() | {"anyio"}  # a dependency of starlette
    floating = [
        name for name, bounds in names("requirements.txt").items() if name not in preinstalled and "<" not in bounds
    ]
    assert floating == []


def test_numpy_has_the_version_of_the_image() -> None:
    """Test the NumPy version for which the image's torch was built. pip would install a newer one."""
    assert names("requirements/toolkit-image.txt")["numpy"] == "==1.26.4"


def pins(file: str) -> dict[str, str]:
    """Return the version of each pinned package of a requirements file."""
    lines = re.findall(r"^([\w-]+)(?:\[[\w,-]+\])?==([\w.]+)", (ROOT / file).read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in lines}


@pytest.mark.parametrize(
    ("file", "replaced"),
    [("requirements/toolkit-image.txt", {"diffusers", "peft"}), ("requirements/lock-cpu.txt", {"diffusers"})],
)
def test_pip_replaces_no_other_package(file: str, replaced: set[str]) -> None:
    """Test requirements.txt over the image's packages, and over the newest ones, which a later image may have.

    Any other package that pip replaces may break the toolkit: it needs a trial in the real one.
    """
    installed = pins(file)
    lines = re.sub(r"#.*", "", (ROOT / "requirements.txt").read_text()).split()
    wanted = {requirement.name.replace("_", "-"): requirement for requirement in map(Requirement, lines)}
    assert len(installed.keys() & wanted.keys()) >= 7
    assert replaced == {
        name for name in installed.keys() & wanted.keys() if not wanted[name].specifier.contains(installed[name])
    }


def test_both_locks_have_the_same_packages() -> None:
    """Test that one audit covers both container images."""
    cpu, cuda = pins("requirements/lock-cpu.txt"), pins("requirements/lock-cuda.txt")
    assert cpu.items() <= cuda.items()
    assert all(name.startswith(("cuda-", "nvidia-")) or name == "triton" for name in cuda.keys() - cpu.keys())


@pytest.mark.slow
def test_the_installed_packages_are_consistent() -> None:
    """Test the endpoint's environment: requirements.txt with the image's pins must break no package."""
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
