"""Tests that each file, class, function, variable, path and target in docs/architecture.md exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from handlers.serving.http.app import build_app
from handlers.serving.settings import Settings
from handlers.serving.vae.memory import Mode
from scripts.local_server import ROOT

DOCUMENT = ROOT / "docs" / "architecture.md"
TEXT = DOCUMENT.read_text()
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
DIAGRAM = re.search(r"```mermaid\n(.*?)```", TEXT, re.DOTALL)[1]


def defined(node: ast.AST, owner: str = "") -> Iterator[str]:
    """Yield the names that a module or a class defines, with the class before its members."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS | ast.ClassDef):
            yield owner + child.name
            yield from defined(child, owner if isinstance(child, FUNCTIONS) else f"{owner}{child.name}.")
        for target in child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]:
            if isinstance(target, ast.Attribute):
                yield owner + target.attr
            elif isinstance(target, ast.Name) and not isinstance(node, FUNCTIONS):
                yield owner + target.id


def known() -> set[str]:
    names = {"handlers/", "endpoint.json", *(mode.value for mode in Mode)}
    scripts = [ROOT / "scripts" / name for name in ("connections.py", "instances.py")]
    for path in [*(ROOT / "handlers").rglob("*.py"), *scripts]:
        names |= {path.name, *defined(ast.parse(path.read_text()))}
    names |= {f"VAE_{name.upper()}" for name in Settings.model_fields}
    names |= {route.path for route in build_app().routes}
    return names | {f"make {target}" for target in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)}


def test_links_resolve() -> None:
    links = set(re.findall(r"\]\(([^)]+)\)", TEXT))
    assert [link for link in links if not (DOCUMENT.parent / link).exists()] == []
    assert len(links) > 30


def test_each_name_exists() -> None:
    named = set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", TEXT)) | set(re.findall(r"\w+\.\w+|\w+_\w+", DIAGRAM))
    threads = {"device-0", "device-1", "fast-0", "mp4"}
    assert sorted(named - known() - threads - {"Accept"}) == []
    assert len(named) > 80


def test_the_diagram_has_the_numbers_of_the_text() -> None:
    section = TEXT.partition("## The life of a request")[2].partition("\n## ")[0]
    numbers = re.findall(r"^(\d+)\. ", section, re.MULTILINE)
    assert set(re.findall(r": (\d+) ", DIAGRAM)) == set(numbers)
