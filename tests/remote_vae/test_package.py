"""Tests of the package that `pip install "remote-vae @ git+..."` installs."""

import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from handlers.version import VERSION
from scripts.local_server import ROOT
from tests.support import forked
from tests.support.packages import dependencies, lend

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


def empty_environment(folder: Path) -> tuple[Path, Path]:
    """Create a virtual environment without packages. Return its folder of commands and its `site-packages`."""
    venv.create(folder, with_pip=False)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    return folder / "bin", packages


def lend_needed(packages: Path) -> None:
    """Lend what the installed package declares, without extras."""
    (installed,) = (each for each in distributions(path=[str(packages)]) if each.name == "remote-vae")
    lend(dependencies(line for line in installed.requires if "extra ==" not in line), packages)


def test_the_wheel_in_a_clean_environment(tmp_path: Path) -> None:
    """Install the wheel beside the packages that its metadata names, and theirs.

    The process that imports torch and diffusers, which the user installs, is forked.
    """
    copy_package(tmp_path / "project")
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, tmp_path / "project")
    run(sys.executable, *build, folder=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"remote_vae", f"remote_vae-{VERSION}.dist-info"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "remote_vae").rglob("*.py")}
    assert modules | {"remote_vae/py.typed"} <= set(names)
    commands, packages = empty_environment(tmp_path / "venv")
    python = commands / "python"
    install = ("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--no-compile", wheel)
    run(sys.executable, *install, folder=tmp_path)
    lend_needed(packages)
    assert "--retry-timeout" in run(commands / "remote-vae", "proxy", "--help", folder=tmp_path)
    code = "import remote_vae, importlib.metadata as m; print(remote_vae.RemoteVAE.__module__, "
    code += "remote_vae.__file__, m.version('remote-vae'))"
    status, printed, errors = forked.run("-c", code, folder=tmp_path, PYTHONPATH=str(packages))
    assert status == 0, errors
    assert printed.split() == ["remote_vae.vae", str(packages / "remote_vae" / "__init__.py"), VERSION]
    assert run(commands / "remote-vae", "--version", folder=tmp_path).strip() == VERSION


def test_make_install_brings_the_command(tmp_path: Path) -> None:
    """Run the last command of the target in a copy of the project. The commands before it install the dependencies."""
    copy_package(tmp_path / "project")
    shutil.copytree(ROOT / "scripts", tmp_path / "project" / "scripts")
    commands, packages = empty_environment(tmp_path / "venv")
    lend(("pip", "setuptools"), packages)
    rule = ("make", "--dry-run", "--always-make", "--no-print-directory", "install", f"VENV={tmp_path / 'venv'}")
    *_, command = (line for line in run(*rule, folder=tmp_path / "project").splitlines() if " pip install " in line)
    assert command.endswith("-e .")
    run("sh", "-c", f"{command} --no-build-isolation", folder=tmp_path / "project")
    lend_needed(packages)
    assert run(commands / "remote-vae", "--version", folder=tmp_path).strip() == VERSION
