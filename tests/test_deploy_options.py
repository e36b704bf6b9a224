"""Options of the commands that `make` runs: one for each variable of the target."""

from __future__ import annotations

import re

import pytest

from tests.support import forked
from tests.test_makefile import COMMANDS, VARIABLES, make


@pytest.mark.slow
@pytest.mark.parametrize("target", COMMANDS)
def test_a_command_has_an_option_for_each_variable(target: str) -> None:
    line = make(target)[1]
    module, *subcommand = re.search(r"python -m (\S+)(.*)$", line)[0].removeprefix("python -m ").split()
    words = [word for word in subcommand if word != "--all"]
    _, shown, _ = forked.run("-m", module, *words, "--help", COLUMNS="200")
    options = set(re.findall(r"--[a-z-]+", shown))
    assert {f"--{name.lower().replace('_', '-')}" for name in VARIABLES[target]} <= options
