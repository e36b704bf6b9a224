"""What `make` makes of variables. Nothing runs: `make -n` prints what would."""

from __future__ import annotations

import subprocess

import pytest

from scripts.local_server import ROOT


def make(*arguments: str) -> tuple[int, str]:
    """The status, and the last line that is said."""
    command = ["make", "-n", "--no-print-directory", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.returncode, " ".join((result.stdout + result.stderr).splitlines()[-1].split())


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("deploy", "MODEL=flux", "DRY_RUN=1"), '--model "flux" --dry-run'),
        (("deploy", "MODEL=flux", "DRY_RUN=0"), '--model "flux"'),
        (("deploy", "MODEL=flux", "DRY_RUN="), '--model "flux"'),
        (("deploy-all", "DRY_RUN=1"), "--all --dry-run"),
        (("pause-all", "NAMESPACE=lab"), '--all --namespace "lab"'),
        (("deploy", "MODEL=a,b", "MIN_REPLICA=1", "KEEP=1"), '--model "a,b" --min-replica "1" --keep'),
        (("undeploy", "MODEL=x", "YES=0", "DELETE_REPO=0"), '--model "x"'),
        (("undeploy", "MODEL=x", "YES=1", "DELETE_REPO="), '--model "x" --yes'),
        (("undeploy", "MODEL=x", "YES=1", "DELETE_REPO=1"), '--model "x" --delete-repo --yes'),
        (("test", "ARGS=-k a=b -x"), "pytest -k a=b -x"),
        (("test-page", "PAGE_ARGS=-x"), "python -m pytest tests/page -x"),
    ],
)
def test_a_switch_is_on_for_1_alone(arguments: tuple[str, ...], options: str) -> None:
    status, line = make(*arguments)
    assert status == 0
    named = "" if arguments[0].startswith("test") else f"{arguments[0].removesuffix('-all')} "
    assert line.endswith(named + options)


@pytest.mark.parametrize("target", ["serve", "demo", "screenshots", "bench", "fuzz", "soak"])
def test_what_serves_gets_the_signals_itself(target: str) -> None:
    """Of a shell between them `make` would end that one alone, and leave the server on its port."""
    status, line = make(target)
    assert status == 0
    assert line.startswith("exec ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("deploy", "MODEL=flux", "DRYRUN=1"), "`make deploy` takes no DRYRUN; it takes ACCESS DRY_RUN INSTANCE"),
        (("deploy-all", "INSTANCE=nvidia-l4"), "`make deploy-all` takes no INSTANCE; it takes ACCESS DRY_RUN"),
        (("deploy", "MODEL=flux", "DRY_RUN=yes"), "DRY_RUN=yes is neither 1, for on, nor 0"),
        (("undeploy", "MODEL=x", "YES=true"), "YES=true is neither 1, for on, nor 0"),
        (
            ("serve", "API_TOKEN=x"),
            "API_TOKEN is an environment variable: write it before make, as in `API_TOKEN=... make",
        ),
        (("serve", "MODEL=tiny", "VAE_FAST=1"), "as in `VAE_FAST=... make serve`"),
        (("lint", "FIX=1"), "`make lint` takes no FIX."),
    ],
)
def test_anything_else_is_an_error_before_anything_happens(arguments: tuple[str, ...], said: str) -> None:
    status, line = make(*arguments)
    assert status == 2
    assert said in line
