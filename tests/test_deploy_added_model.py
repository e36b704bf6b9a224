"""Tests of deploying the new model of the documentation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_adding_a_model import KEY, declare, project, weights

__all__ = ["project", "weights"]  # fixtures


@pytest.mark.slow
def test_the_documented_model_can_be_deployed(project: Path) -> None:
    command = [sys.executable, "-m", "scripts.deploy", "deploy", "--model", KEY, "--dry-run"]
    planned = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True)
    assert f"Plan for MODEL={KEY}" in planned.stdout

    declare(project, "    latent_channels = 4\n", "")
    refused = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert refused.stderr.splitlines() == [
        f"error: {KEY} does not declare latent_channels; handlers/model.py says what that is"
    ]
    declare(project, '    dtype = "float32"\n', "")
    refused = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert refused.stderr.splitlines() == [f"error: {KEY} does not declare dtype; handlers/model.py says what that is"]
