import subprocess
import sys


def test_what_is_installed_is_consistent() -> None:
    """In the endpoint's environment: requirements.txt over the image's pins leaves no package that another breaks."""
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
