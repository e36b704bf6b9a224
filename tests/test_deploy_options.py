"""Options of the commands that `make` runs: one for each variable of the target."""

from __future__ import annotations

import re
import runpy
import sys

import pytest

from tests.test_makefile import COMMANDS, VARIABLES, make


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # another test may have imported it
@pytest.mark.parametrize("target", COMMANDS)
def test_a_command_has_an_option_for_each_variable(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run `python -m ... --help` in this process."""
    line = make(target)[1]
    module, *subcommand = re.search(r"python -m (\S+)(.*)$", line)[0].removeprefix("python -m ").split()
    words = [word for word in subcommand if word != "--all"]
    monkeypatch.setattr(sys, "argv", [module, *words, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        runpy.run_module(module, run_name="__main__")
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert {f"--{name.lower().replace('_', '-')}" for name in VARIABLES[target]} <= options
