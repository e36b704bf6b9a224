"""The README is true: its Python runs, and its commands are there."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from handlers.serving import metrics
from handlers.serving.limits import Limits
from scripts.local_server import ROOT
from tests.conftest import Endpoint

README = (ROOT / "README.md").read_text()
PYTHON = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "EndpointHandler" not in block]
COMMANDS = sorted(set(re.findall(r"^\$ make ([a-z-]+)", README, re.MULTILINE)))
MODELS_SHOWN = dict.fromkeys(re.findall(r"# MODEL=([a-z0-9-]+)", README))


@pytest.mark.parametrize("key", MODELS_SHOWN)
def test_snippets_run_as_they_stand(
    key: str, running: Callable[[str], Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    setup, *snippets = PYTHON
    namespace: dict = {}
    exec(setup, namespace)
    namespace["ENDPOINT"] = running(key).url
    mine = [snippet for snippet in snippets if snippet.startswith(f"# MODEL={key}")]
    for snippet in mine:
        exec(snippet, namespace)
    assert mine
    assert "image" in namespace or Path("video.mp4").stat().st_size > 1000


def test_variables_of_make_serve_reach_the_server() -> None:
    variables = ["MODEL=flux", "HOST=::", "PORT=9", "DEVICE=cpu", "DTYPE=float32", "WEIGHTS=random"]
    result = subprocess.run(
        ["make", "-n", "--no-print-directory", "serve", *variables],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    command = " ".join(result.stdout.splitlines()[-1].split())
    options = '--model "flux" --port "9" --host "::" --weights "random" --device "cpu" --dtype "float32"'
    assert command.endswith(f"-m scripts.serve {options}")


@pytest.mark.parametrize("target", COMMANDS)
def test_commands_are_targets(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_models_table_is_the_one_of_the_code() -> None:
    command = [sys.executable, "-m", "scripts.models"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for key, factor in re.findall(r"^\| `([a-z0-9-]+)` \|.*\| ([0-9.]+)", README, re.MULTILINE):
        assert re.search(rf"^ *{key} .* {factor} ", result.stdout, re.MULTILINE), (key, factor)


def test_limits_are_those_of_the_code_with_their_defaults() -> None:
    table = README[README.index("**Limits.**") : README.index("**Health.**")]
    rows = re.findall(r"^\| (`VAE_.*?) \| .* \| ([\d., ]+) \|$", table, re.MULTILINE)
    shown = {
        name: default
        for names, defaults in rows
        for name, default in zip(re.findall(r"VAE_(\w+)", names), defaults.split(", "), strict=True)
    }
    assert shown == {name.upper(): str(field.default) for name, field in Limits.model_fields.items()}


def test_metrics_are_those_of_the_code() -> None:
    text = metrics.exposition().decode()
    there = set(re.findall(r"^# TYPE ((?:vae|inf)_\w+)", text, re.MULTILINE))
    table = README[README.index("**Metrics.**") : README.index("Worth an alert")]
    assert set(re.findall(r"(?:vae|inf)_\w+", table)) == there
