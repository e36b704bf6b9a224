"""Tests of deploying the new model of the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import forked
from tests.test_adding_a_model import KEY, declare, project, weights

__all__ = ["project", "weights"]  # fixtures


@pytest.mark.slow
def test_the_documented_model_can_be_deployed(project: Path) -> None:
    def plan() -> tuple[int, str, str]:
        return forked.run("-m", "scripts.deploy", "deploy", "--model", KEY, "--dry-run", folder=project)

    status, planned, _ = plan()
    assert (status, f"Plan for MODEL={KEY}" in planned) == (0, True)

    declare(project, "    latent_channels = 4\n", "")
    assert plan()[2].splitlines() == [
        f"error: {KEY} does not declare latent_channels; handlers/model.py says what that is"
    ]
    declare(project, '    dtype = "float32"\n', "")
    assert plan()[2].splitlines() == [f"error: {KEY} does not declare dtype; handlers/model.py says what that is"]
