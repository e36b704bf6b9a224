"""What GitHub reads of this repository, and the changelog."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import handlers
from handlers.version import VERSION
from scripts.local_server import ROOT

GITHUB = ROOT / ".github"
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def test_the_workflow_calls_what_must_hold_on_the_images_python_and_another() -> None:
    workflow = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["run"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    first, newest = job["strategy"]["matrix"]["python"]
    run = (ROOT / ".ci" / "run").read_text()
    assert f"!= ({first.replace('.', ', ')})" in run  # where the toolkit's pins are tested
    assert tuple(map(int, newest.split("."))) > tuple(map(int, first.split(".")))


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_a_form_is_one_that_github_takes(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert content.keys() == {"name", "description", "labels", "body"}
    asked = [part for part in content["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len({part["attributes"]["label"] for part in asked}) == len(asked) > 5
    for part in content["body"]:
        assert part.keys() <= {"type", "id", "attributes", "validations"}
        own = {"markdown": {"value"}, "dropdown": {"options"}, "input": {"placeholder"}, "textarea": {"render"}}
        assert part["attributes"].keys() <= {"label", "description"} | own[part["type"]]
        assert all(isinstance(option, str) for option in part["attributes"].get("options", []))


def test_the_forms_ask_for_what_there_is() -> None:
    """The headers, as the service names them, and the commands."""
    text = "".join(form.read_text() for form in FORMS)
    code = "".join(path.read_text() for path in (ROOT / "handlers" / "serving").rglob("*.py"))
    assert [name for name in re.findall(r"`([A-Z][a-zA-Z-]+)`", text) if name not in code] == []
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


IN_THE_BACKGROUND = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
import tests.conftest
ignores = "import signal, sys; sys.exit(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
sys.exit(subprocess.call([sys.executable, "-c", ignores]))
"""


@pytest.mark.slow
def test_what_the_tests_start_takes_ctrl_c_in_the_background_too() -> None:
    """Run them as a shell does for `nohup make test &`, which ignores SIGINT."""
    assert subprocess.run([sys.executable, "-c", IN_THE_BACKGROUND], cwd=ROOT, timeout=120).returncode == 0


def test_the_changelogs_newest_version_is_the_one_that_is_served() -> None:
    unreleased, newest = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[:2]
    assert (unreleased, newest) == ("Unreleased", VERSION)
    assert handlers.__version__ == VERSION
