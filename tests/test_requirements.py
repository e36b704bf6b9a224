import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_the_installed_packages_are_consistent() -> None:
    """Test the endpoint's environment: requirements.txt with the image's pins must break no package."""
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
