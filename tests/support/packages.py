"""Packages of the tests' environment: what they need, and how an empty environment gets them without a network."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def dependencies(names: Iterable[str]) -> set[str]:
    """Return packages and all packages that they need, by the versions that are installed here."""
    found: dict[str, Requirement] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        package = waiting.pop()
        if str(package) not in found:
            found[str(package)] = package
            with suppress(PackageNotFoundError):  # for another version of a package that is installed
                for needed in map(Requirement, requires(package.name) or []):
                    if any(not needed.marker or needed.marker.evaluate({"extra": e}) for e in ("", *package.extras)):
                        waiting.append(needed)
    return {canonicalize_name(package.name) for package in found.values()}


def lend(packages: Iterable[str], folder: Path) -> None:
    """Link these packages, and no others, from `folder`. Raise `PackageNotFoundError` for a missing one."""
    for package in map(distribution, packages):
        for name in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(package.locate_file(name))
