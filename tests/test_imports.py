"""The way of a request runs in one direction, and so do the parts of the project; models are read without torch."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from handlers import MODELS, serving
from scripts.local_server import ROOT

MAY_IMPORT = {
    "handlers": set(),
    "handler": {"handlers"},
    "remote_vae": set(),
    "clients": {"remote_vae"},
    "models": set(),
    "scripts": {"handler", "handlers", "remote_vae"},
    "benchmarks": {"handlers", "remote_vae", "scripts"},
    "traffic": {"handlers", "scripts", "benchmarks"},
    "tests": {"handlers", "remote_vae", "clients", "scripts", "benchmarks", "traffic"},
}
"""What each part of the project knows of the others: what is deployed or installed by itself, nothing around it."""
SERVING = ROOT / "handlers" / "serving"
LAYERS = [line.split()[0] for line in serving.__doc__.splitlines()[2:] if re.match(r"[a-z]+ {2,}", line)]


def layer_of(path: Path) -> str:
    return path.relative_to(SERVING).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """The modules that a file imports, at its top or inside a function, each by its full name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = [path for path in SERVING.rglob("*.py") if path.parent != SERVING or path.stem != "__init__"]


def test_the_list_of_layers_is_the_folder() -> None:
    assert set(LAYERS) == {path.stem for path in SERVING.iterdir()} - {"__init__", "__pycache__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SERVING).as_posix())
def test_a_layer_imports_only_from_the_layers_below_it(path: Path) -> None:
    layers = {name.split(".")[2] for name in imported(path) if name.startswith("handlers.serving.")}
    assert layers <= set(LAYERS[LAYERS.index(layer_of(path)) :])
    outside = {name.split(".")[1] for name in imported(path) if name.startswith("handlers.")} - {"serving"}
    assert outside <= {"model", "version"}  # what a model declares, and of which version it all is


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SERVING).as_posix())
def test_http_knows_no_torch_and_only_http_knows_http(path: Path) -> None:
    libraries = {name.split(".")[0] for name in imported(path)}
    if layer_of(path) == "http":
        assert not libraries & {"torch", "diffusers", "numpy", "PIL"}
    else:
        assert not libraries & {"starlette", "uvicorn", "httptools"}


def test_no_import_goes_in_a_circle() -> None:
    """Also not one inside a function; and none is for the types alone."""
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "handlers").rglob("*.py")}
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in trees}
    imports: dict[str, set[str]] = {}
    for module, path in modules.items():
        assert "TYPE_CHECKING" not in ast.dump(trees[path]), module
        found = [node for node in ast.walk(trees[path]) if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in found for alias in node.names}
        imports[module] = (names | {node.module for node in found}) & modules.keys()
    assert len(list(TopologicalSorter(imports).static_order())) == len(modules)
    assert imports["handlers.base"] == {"handlers.model", "handlers.serving.pipeline"}


def test_of_torchs_private_modules_there_is_one_that_the_image_has_too() -> None:
    """Its torch is an older one."""
    files = [file for part in MAY_IMPORT for file in (ROOT / part).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert {module for module in modules if module.startswith("torch._")} == {"torch._subclasses"}


def test_models_are_read_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import handlers; print(*handlers.MODELS)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == list(MODELS)


def test_every_part_is_linted() -> None:
    (sources,) = re.findall(r"^SOURCES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {source.removesuffix(".py") for source in sources.split()} == MAY_IMPORT.keys()


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_those_below_it(part: str) -> None:
    files = [ROOT / "handler.py"] if part == "handler" else (ROOT / part).rglob("*.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    others = {module.split(".")[0] for module in modules} & MAY_IMPORT.keys() - {part}
    assert others <= MAY_IMPORT[part]
