"""Test of `deploy/remote-vae.service` with Debian's systemd-analyze, which needs no running systemd."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from scripts.local_server import ROOT

UNIT = ROOT / "deploy" / "remote-vae.service"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/remote-vae/.venv/bin/python", sys.executable))
    result = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert [line for line in result.stderr.splitlines() if unit.name in line] == []
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", unit], capture_output=True, text=True, check=True
    )
    rating = re.search(r"Overall exposure level .*: ([\d.]+)", rated.stdout)[1]
    assert f"rates the unit at {rating} of 10" in " ".join((ROOT / "docs" / "self-hosting.md").read_text().split())
