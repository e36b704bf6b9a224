"""Copies of the project that tests change."""

from __future__ import annotations

import shutil
from pathlib import Path

PROJECT = Path(__file__).parents[2]


def few_files(folder: Path) -> Path:
    """Copy the files beside the models that every upload has, and one model."""
    for name in ("handler.py", "requirements.txt", "handlers/__init__.py", "handlers/flux.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, folder / name)
    return folder


def copy_project(folder: Path) -> Path:
    """Copy the project, with the files of a working tree that must not be uploaded."""
    copy = folder / "project"
    copy.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("handlers", "remote_vae", "scripts", "models"):
        shutil.copytree(PROJECT / name, copy / name, ignore=ignored)
    for name in ("handler.py", "requirements.txt", "Makefile"):
        shutil.copy(PROJECT / name, copy / name)
    for name in (
        ".env",
        ".git/config",
        "out/demo.png",
        "tests/test_x.py",
        "handlers/__pycache__/flux.pyc",
        "handlers/.secret.py",
        "handlers/notes.txt",
        "handlers/serving/__pycache__/vae.py",
        "endpoint.json",
    ):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("not for upload")
    return copy
