import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def names(file: str) -> dict[str, str]:
    """Package and version of each line of a file of requirements."""
    lines = re.findall(r"^([\w-]+)(?:\[\w+\])?([<>=].*)?$", (ROOT / file).read_text(), re.MULTILINE)
    return {name.lower(): bounds for name, bounds in lines}


def test_what_the_image_does_not_hold_has_an_upper_bound() -> None:
    """An endpoint installs it anew at each start."""
    held = names("requirements/toolkit-image.txt").keys() | {"anyio"}  # of starlette
    floating = [name for name, bounds in names("requirements.txt").items() if name not in held and "<" not in bounds]
    assert floating == []


def test_numpy_is_the_images() -> None:
    """For which its torch was built; of itself pip takes a newer one."""
    assert names("requirements/toolkit-image.txt")["numpy"] == "==1.26.4"


@pytest.mark.slow
def test_what_is_installed_is_consistent() -> None:
    """In the endpoint's environment: requirements.txt over the image's pins leaves no package that another breaks."""
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
