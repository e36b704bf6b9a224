"""Tests of variables of `make`. `make -n` prints the commands. Elsewhere a stand-in for Python prints its arguments."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.local_server import ROOT
from scripts.make_options import SWITCHES, TAKES

pytestmark = pytest.mark.slow

VARIABLES = {target: set(names.split()) for target, names in TAKES.items()}
COMMANDS = sorted(VARIABLES.keys() - {"test", "test-endpoint", "test-page", "image", "test-image"})
ENVIRONMENT = {**os.environ, "PYTHON": os.path.relpath(sys.executable, ROOT)}
"""The Python of the tests starts faster than a `python3` that looks for a version."""
PYTHON = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('PYTEST_ADDOPTS')]))"


def make(*arguments: str, **environment: str) -> tuple[int, str]:
    """Return the status and the last line of the output."""
    command = ["make", "-n", "--no-print-directory", *arguments]
    names = set().union(*VARIABLES.values()) - environment.keys()
    kept = {name: value for name, value in ENVIRONMENT.items() if name not in names}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**kept, **environment})
    return result.returncode, " ".join((result.stdout + result.stderr).splitlines()[-1].split())


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("deploy", "MODEL=flux", "DRY_RUN=1"), '--model="$MODEL" --dry-run'),
        (("deploy", "MODEL=flux", "DRY_RUN=0"), '--model="$MODEL"'),
        (("deploy", "MODEL=flux", "DRY_RUN="), '--model="$MODEL"'),
        (("deploy-all", "DRY_RUN=1"), "--all --dry-run"),
        (("pause-all", "NAMESPACE=lab"), '--all --namespace="$NAMESPACE"'),
        (("deploy", "MODEL=a,b", "MIN_REPLICA=1", "KEEP=1"), '--model="$MODEL" --min-replica="$MIN_REPLICA" --keep'),
        (("undeploy", "MODEL=x", "YES=0", "DELETE_REPO=0"), '--model="$MODEL"'),
        (("undeploy", "MODEL=x", "YES=1", "DELETE_REPO="), '--model="$MODEL" --yes'),
        (("undeploy", "MODEL=x", "YES=1", "DELETE_REPO=1"), '--model="$MODEL" --delete-repo --yes'),
    ],
)
def test_a_switch_is_on_only_for_1(arguments: tuple[str, ...], options: str) -> None:
    status, line = make(*arguments)
    assert status == 0
    assert line.endswith(f"{arguments[0].removesuffix('-all')} {options}")


@pytest.fixture
def called(tmp_path: Path) -> list[str]:
    """Return `make` with a stand-in for each environment's Python, which prints its arguments and `PYTEST_ADDOPTS`."""
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S -c "{PYTHON}" "$@"\n')
    (venv / "python").chmod(0o755)
    for stamp in (".installed", ".bench"):
        (venv / stamp).touch()
    folders = (f"{name}={venv.parent}" for name in ("VENV", "ENDPOINT_VENV", "DEPLOY_VENV"))
    return ["make", "--no-print-directory", "--silent", *folders]


def run(command: list[str]) -> tuple[list[str], str | None]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hostile(file: Path) -> str:
    """Return a value that creates the file when a shell or `make` evaluates it."""
    touch = f"touch {file}"
    return f"-x '$({touch})' \"; {touch}; `{touch}` $$({touch}) $(shell {touch}) ${{HOME}} \\ # %\n\t{touch}\n' {touch}"


@pytest.mark.parametrize("target", COMMANDS)
def test_a_value_is_data(target: str, called: list[str], tmp_path: Path) -> None:
    """Test that each variable of a target reaches its command unchanged. A quote once cut `--dry-run` off."""
    value, switches = hostile(tmp_path / "made"), VARIABLES[target] & SWITCHES
    names = VARIABLES[target] - SWITCHES
    arguments, _ = run([*called, target, *(f"{name}={value}" for name in names), *(f"{name}=1" for name in switches)])
    options = {f"--{name.lower().replace('_', '-')}" for name in switches}
    options |= {f"--{name.lower().replace('_', '-')}={value}" for name in names}
    assert {argument for argument in arguments if argument.startswith("--")} - {"--all"} == options
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("target", ["test", "test-endpoint"])
def test_words_for_pytest_are_data(target: str, called: list[str], tmp_path: Path) -> None:
    """Test that quotes keep words together when pytest splits them."""
    words = f"-k 'a and b' $(touch {tmp_path}/made) `touch {tmp_path}/made` ; touch {tmp_path}/made"
    arguments, added = run([*called, target, f"ARGS={words}"])
    assert arguments == ["-m", "pytest"]
    assert added.strip() == words
    assert run([*called, target])[1].strip() == "-n 3 --dist worksteal"
    assert not (tmp_path / "made").exists()


def test_values_for_docker_are_data(tmp_path: Path) -> None:
    """Test `make image` with a stand-in for docker, which prints its arguments. BUILD_ARGS are split at spaces."""
    (tmp_path / "docker").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S -c "{PYTHON}" "$@"\n')
    (tmp_path / "docker").chmod(0o755)
    value = hostile(tmp_path / "made")
    make_image = ["env", f"PATH={tmp_path}:{os.environ['PATH']}", "make", "--no-print-directory", "--silent", "image"]
    assert run(make_image)[0] == ["build", "--target", "cpu", "--tag", "remote-vae", "."]
    arguments, _ = run([*make_image, f"TARGET={value}", f"TAG={value}", f"BUILD_ARGS=--pull `touch {tmp_path}/made`"])
    words = ["--pull", "`touch", f"{tmp_path}/made`"]
    assert arguments == ["build", "--target", value, "--tag", value, *words, "."]
    assert not (tmp_path / "made").exists()


def test_words_for_tests_of_the_web_demo_are_data(tmp_path: Path) -> None:
    value = hostile(tmp_path / "made")
    status, line = make("test-page", f"PAGE_ARGS={value}", f"TOOLKIT={value}")
    assert (status, line) == (0, "PYTHONPATH=.venv-page .venv/bin/python -m pytest tests/page")
    assert not (tmp_path / "made").exists()


UNSAFE = ["a$(shell touch {})", "a;touch {}", "a\ntouch {}", "a: ; touch {} #", "a b", "`touch {}`"]


# PYTHON runs the check itself. The check of the others is one expression, whose message has the name.
@pytest.mark.parametrize(
    ("name", "path"),
    [
        *(("PYTHON", path) for path in UNSAFE),
        *zip(("VENV", "BIN", "ENDPOINT_VENV", "DEPLOY_VENV"), UNSAFE, strict=False),
    ],
)
def test_a_path_has_plain_characters(name: str, path: str, tmp_path: Path) -> None:
    """Test a path, because it is part of rules."""
    for value in (path, path + "\n"):
        status, line = make("lint", f"{name}={value.format(tmp_path / 'made')}")
        assert status == 2
        assert f"{name} is a path of letters, digits and _ . / + -" in line
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("target", ["serve", "demo", "screenshots", "bench", "fuzz", "soak"])
def test_servers_get_the_signals_directly(target: str) -> None:
    """Test `exec`, which leaves no shell between `make` and the server: `make` would end only that shell."""
    status, line = make(target)
    assert status == 0
    assert line.startswith("exec ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deploy", "DRYRUN=1"), "`make deploy` takes no DRYRUN (did you mean DRY_RUN?); it takes ACCESS DRY_RUN"),
        (("deploy", "model=flux"), "`make deploy` takes no model (did you mean MODEL?); it takes ACCESS DRY_RUN"),
        (("deploy", "REGON=x"), "`make deploy` takes no REGON (did you mean REGION?); it takes ACCESS DRY_RUN"),
        (("deploy-all", "INSTANCE=nvidia-l4"), "`make deploy-all` takes no INSTANCE; it takes ACCESS DRY_RUN"),
        (("deploy", "MODEL=flux", "DRY_RUN=yes"), "DRY_RUN=yes is neither 1, for on, nor 0"),
        (("deploy", "MODEL=flux", "DRY_RUN=0 1"), "DRY_RUN=0 1 is neither 1, for on, nor 0"),
        (("undeploy", "MODEL=x", "YES=true"), "YES=true is neither 1, for on, nor 0"),
        (
            ("serve", "API_TOKEN=x"),
            "API_TOKEN is an environment variable: write it before make, as in `API_TOKEN=... make",
        ),
        (("serve", "MODEL=tiny", "VAE_FAST=1"), "as in `VAE_FAST=... make serve`"),
        (("undeploy", "MODEL=x", "YES=1 0"), "YES=1 0 is neither 1, for on, nor 0"),
        (("lint", "FIX=1"), "`make lint` takes no FIX."),
    ],
)
def test_wrong_variables_are_an_error_before_any_command(arguments: tuple[str, ...], message: str) -> None:
    status, line = make(*arguments)
    assert status == 2
    assert message in line


def test_the_environment_sets_no_options() -> None:
    """Test that `DRY_RUN=1 make deploy` neither deploys nor plans.

    Systems set NAME and HOST, so the targets ignore them.
    """
    for name in ("DRY_RUN", "REGION", "MODEL"):
        status, line = make("deploy", **{name: "1"})
        assert status == 2
        assert f"the environment has {name}, and is not read: write it after `make deploy`, or unset it" in line
    assert make("deploy", "REGION=", "MODEL=flux", REGION="mars")[1].endswith('deploy --model="$MODEL"')
    assert make("deploy", "MODEL=flux", NAME="DESKTOP-1")[1].endswith('deploy --model="$MODEL"')
    assert make("serve", "MODEL=tiny", HOST="desktop")[1].endswith('serve --model="$MODEL"')
    assert make("lint", REGION="mars", MODEL="flux")[0] == 0
