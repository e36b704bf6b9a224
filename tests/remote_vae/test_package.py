"""Tests of the package that `pip install "remote-vae @ git+..."` installs."""

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from handlers.version import VERSION
from scripts.local_server import ROOT

pytestmark = pytest.mark.slow


def run(*command: object, folder: Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_package(project: Path) -> None:
    """Copy the package's sources, because a build leaves files behind."""
    for folder in ("remote_vae", "handlers"):
        shutil.copytree(ROOT / folder, project / folder)
    for file in ("pyproject.toml", "Makefile", "LICENSE"):
        shutil.copy(ROOT / file, project)
    shutil.copytree(ROOT / "requirements", project / "requirements")


@pytest.mark.timeout(600)
def test_the_wheel_in_a_clean_environment(tmp_path: Path) -> None:
    """Borrow torch and diffusers, which the user installs, from the tests' environment."""
    copy_package(tmp_path / "project")
    build = ("-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "project")
    run(sys.executable, *build, folder=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"remote_vae", f"remote_vae-{VERSION}.dist-info"}
    assert "remote_vae/py.typed" in names
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-compile", wheel, folder=tmp_path)
    assert "--retry-timeout" in run(python.parent / "remote-vae", "proxy", "--help", folder=tmp_path)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    borrowed = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "borrowed.pth").write_text(f"import sys; sys.path.insert(0, {borrowed!r})")
    code = "import remote_vae, importlib.metadata as m; print(remote_vae.RemoteVAE.__module__, m.version('remote-vae'))"
    assert run(python, "-c", code, folder=tmp_path).split() == ["remote_vae.vae", VERSION]
    assert run(python.parent / "remote-vae", "--version", folder=tmp_path).strip() == VERSION


def test_make_install_brings_the_command(tmp_path: Path) -> None:
    """Run the last command of the target in a copy of the project. The commands before it install the dependencies."""
    copy_package(tmp_path / "project")
    shutil.copytree(ROOT / "scripts", tmp_path / "project" / "scripts")
    venv.create(tmp_path / "venv", with_pip=True)
    rule = ("make", "--dry-run", "--always-make", "--no-print-directory", "install", f"VENV={tmp_path / 'venv'}")
    *_, command = (line for line in run(*rule, folder=tmp_path / "project").splitlines() if " pip install " in line)
    assert command.endswith("-e .")
    run("sh", "-c", command, folder=tmp_path / "project")
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    borrowed = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "borrowed.pth").write_text(f"import sys; sys.path.append({borrowed!r})")
    assert run(tmp_path / "venv" / "bin" / "remote-vae", "--version", folder=tmp_path).strip() == VERSION
