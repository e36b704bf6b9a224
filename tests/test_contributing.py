"""Tests of the files that GitHub reads, and of the changelog."""

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


def test_the_workflow_runs_the_checks_on_two_versions_of_python() -> None:
    workflow = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["run"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    first, newest = job["strategy"]["matrix"]["python"]
    run = (ROOT / ".ci" / "run").read_text()
    assert f"!= ({first.replace('.', ', ')})" in run  # with this Python, CI tests the toolkit's pins
    assert tuple(map(int, newest.split("."))) > tuple(map(int, first.split(".")))


def test_a_release_is_published_from_its_tag_without_a_stored_token() -> None:
    workflow = yaml.safe_load((GITHUB / "workflows" / "release.yml").read_text())
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as true
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    commands = [step["run"] for step in build["steps"] if "run" in step]
    assert [command for command in commands if "python -m build" in command or "twine check" in command] == commands[
        -2:
    ]
    audit = next(command for command in commands if "pip-audit" in command)
    assert f"$ {audit}\n" in (ROOT / "docs" / "self-hosting.md").read_text()
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    image = workflow["jobs"]["image"]
    assert (image["needs"], image["permissions"]["packages"]) == ("build", "write")
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert all(f"AS {target}\n" in dockerfile for target in image["strategy"]["matrix"]["target"])
    assert "secrets." not in (GITHUB / "workflows" / "release.yml").read_text()


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_github_accepts_each_form(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert content.keys() == {"name", "description", "labels", "body"}
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    labels = {field["attributes"]["label"] for field in fields}
    assert len({field["id"] for field in fields}) == len(labels) == len(fields) > 5
    for field in content["body"]:
        assert field.keys() <= {"type", "id", "attributes", "validations"}
        own = {"markdown": {"value"}, "dropdown": {"options"}, "input": {"placeholder"}, "textarea": {"render"}}
        assert field["attributes"].keys() <= {"label", "description"} | own[field["type"]]
        assert all(isinstance(option, str) for option in field["attributes"].get("options", []))


def test_the_forms_name_headers_and_commands_that_exist() -> None:
    text = "".join(form.read_text() for form in FORMS)
    code = "".join(path.read_text() for path in (ROOT / "handlers" / "serving").rglob("*.py"))
    assert [name for name in re.findall(r"`([A-Z][a-zA-Z-]+)`", text) if name not in code] == []
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


IN_THE_BACKGROUND = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
import tests.conftest
assert "torch" not in sys.modules, "the process that distributes the tests would import it too"
ignores = "import signal, sys; sys.exit(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
sys.exit(subprocess.call([sys.executable, "-c", ignores]))
"""


@pytest.mark.slow
def test_processes_of_background_tests_accept_ctrl_c() -> None:
    """Run the tests as in a shell with `nohup make test &`, which ignores SIGINT."""
    assert subprocess.run([sys.executable, "-c", IN_THE_BACKGROUND], cwd=ROOT, timeout=120).returncode == 0


def test_the_newest_version_of_the_changelog_is_served() -> None:
    unreleased, newest = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[:2]
    assert (unreleased, newest) == ("Unreleased", VERSION)
    assert handlers.__version__ == VERSION
