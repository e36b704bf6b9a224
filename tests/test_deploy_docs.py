"""Tests of the commands in README.md and docs/deploying.md, as written and in order, against the local Hub."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from handlers import MODELS
from scripts.instances import table_price
from tests.support.deploy_runner import NAMESPACE, PROJECT, PUBLISHED, TOKEN, Runner, deploy, hub
from tests.support.hub_server import Hub, identity
from tests.test_makefile import ENVIRONMENT

__all__ = ["deploy", "hub"]  # fixtures

OTHERS = {"Quota exceeded", "storage limit reached", "is still initializing", "SIZE", "INSTANCE", "VENDOR"}
"""Messages of the platform, a message that ends with a state, and names of variables."""
TARGETS = ("deploy", "deploy-all", "endpoints", "smoke", "pause", "pause-all", "resume", "undeploy")


def documented_commands(text: str) -> list[str]:
    """Return the lines of code that call a deploying target, without prompts and comments."""
    lines = re.findall(rf"^\s*(?:\$ )?(make (?:{'|'.join(TARGETS)})(?= |$)[^#\n]*)", text, re.MULTILINE)
    return [line.strip() for line in lines]


def test_the_documents_show_every_target() -> None:
    commands = documented_commands((PROJECT / "docs" / "deploying.md").read_text())
    assert {shlex.split(command)[1] for command in commands} == set(TARGETS)


def save_python(folder: Path, command: str) -> list[str]:
    """Return `make` with this shell command as the Python of its virtual environment."""
    venv = folder / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    (venv / "python").chmod(0o755)
    (venv / ".installed").touch()
    return ["make", "--no-print-directory", f"DEPLOY_VENV={venv.parent}"]


@pytest.fixture
def make(tmp_path: Path) -> list[str]:
    """Return `make` with the Python of the tests instead of its own virtual environment."""
    return save_python(tmp_path, shlex.quote(sys.executable))


@pytest.fixture
def printing_make(tmp_path: Path) -> list[str]:
    """Return `make` with a stand-in for Python, which prints its arguments, one a line."""
    return save_python(tmp_path, "printf '%s\\n'")


def printed_words(printing_make: list[str], arguments: list[str]) -> list[str]:
    """Return the arguments of `scripts.deploy` in the command of `make` with these arguments."""
    printed = subprocess.run(
        [*printing_make, *arguments], cwd=PROJECT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    option, module, *words = printed.stdout.splitlines()
    assert (option, module) == ("-m", "scripts.deploy")
    return words


def run_all(hub: Hub, deploy: Runner, printing_make: list[str], text: str) -> None:
    """Run the commands of `make` in this process."""
    hub.tokens[TOKEN] = identity(NAMESPACE, orgs={"my-lab": "write"})
    for command in documented_commands(text):
        arguments = shlex.split(command.replace("http://127.0.0.1:8000", f"{hub.url}/live/{NAMESPACE}/my-sdxl-vae"))[1:]
        done = deploy(*printed_words(printing_make, arguments), stdin="y\n")
        assert done.status == 0, f"{command}: {done.out}{done.err}"


def test_every_command_in_the_guide_works_in_order(
    hub: Hub, deploy: Runner, printing_make: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run `make deploy-all` with three models. `tests/test_deploy.py` deploys all."""
    monkeypatch.setattr("scripts.deploy.published_models", lambda image: ["sdxl", "flux", "wan-2.1"])
    run_all(hub, deploy, printing_make, (PROJECT / "docs" / "deploying.md").read_text())


def test_every_command_in_the_readme_works(hub: Hub, deploy: Runner, printing_make: list[str]) -> None:
    """Run each block of code by itself, because the blocks are alternatives."""
    blocks = [
        block
        for block in re.findall(r"^```.*?^```", (PROJECT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
        if documented_commands(block)
    ]
    assert blocks
    for block in blocks:
        hub.endpoints.clear()
        run_all(hub, deploy, printing_make, block)


def test_make_passes_every_variable(deploy: Runner, printing_make: list[str]) -> None:
    variables = {
        "MODEL": "sdxl", "NAMESPACE": "lab", "NAME": "mine", "INSTANCE": "nvidia-a100", "SIZE": "x2", "VENDOR": "aws",
        "REGION": "eu-west-1", "ACCESS": "private", "MIN_REPLICA": "1", "MAX_REPLICA": "5", "SCALE_TO_ZERO": "20",
        "TIMEOUT": "3", "DRY_RUN": "1",
    }  # fmt: skip
    arguments = ["deploy", *(f"{name}={value}" for name, value in variables.items())]
    done = deploy(*printed_words(printing_make, arguments), token=None)
    assert done.status == 0
    for text in (
        "MODEL=sdxl NAMESPACE=lab NAME=mine", "huggingface.co/lab/mine", "nvidia-a100 x2, aws eu-west-1", "private: ",
        "1 to 5", "at most $25.00 an hour",
    ):  # fmt: skip
        assert text in done.out


@pytest.mark.slow
def test_make_fails_with_one_line(make: list[str]) -> None:
    done = subprocess.run(
        [*make, "deploy", "MODEL=fluks"],
        cwd=PROJECT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith(
        "error: there is no model 'fluks' (did you mean flux?); the models are: "
    )


def test_the_script_has_the_messages_of_the_guide() -> None:
    """Find the longest fragment of each message between its values in the script."""
    guide = (PROJECT / "docs" / "deploying.md").read_text().partition("## Troubleshooting")[2].partition("\n## ")[0]
    files = [*(PROJECT / "scripts").rglob("*.py"), PROJECT / "remote_vae" / "check.py"]
    source = re.sub(r'"\s*f?"', "", "".join(file.read_text() for file in files))
    messages = [
        message for row in re.findall(r"^\| (`.*?) \|", guide, re.MULTILINE) for message in re.findall("`(.*?)`", row)
    ]
    fragments = [max(re.split(r"\.\.\.?|\b[\d.]+\b|[A-Z_]+=", message), key=len).strip() for message in messages]
    assert len(fragments) > 20
    assert [fragment for fragment in fragments if fragment not in source and fragment not in OTHERS] == []


def test_the_documented_prices_match_the_table() -> None:
    text = (PROJECT / "docs" / "deploying.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` x1 \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    for instance, price, month in rows:
        assert table_price("aws", instance, "x1") == float(price)
        assert float(month) == pytest.approx(float(price) * 1.25 * 30, abs=0.005)
    instances = [instance for instance, *_ in rows]
    assert set(instances) == {model.instance for model in MODELS.values()}
    assert [MODELS[key].instance for key in ("tiny", "sdxl", "flux")] == instances[:3]
    published = [table_price("aws", MODELS[key].instance, "x1") for key in PUBLISHED]
    (prices,) = re.findall(r"\$([\d.]+) to \$([\d.]+) an hour", (PROJECT / "README.md").read_text())
    assert [float(price) for price in prices] == [min(published), max(published)]
