"""Tests of imports: between the layers of the service, between the folders of the project, and without torch."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
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
    "deploy": {"handler", "handlers"},
    "benchmarks": {"handlers", "remote_vae", "scripts"},
    "traffic": {"handlers", "scripts", "benchmarks"},
    "tests": {"handlers", "remote_vae", "clients", "scripts", "benchmarks", "traffic"},
}
"""Folders that each folder may import. A deployed or installed folder imports no tools."""
SERVING = ROOT / "handlers" / "serving"
LAYERS = [line.split()[0] for line in serving.__doc__.splitlines()[2:] if re.match(r"[a-z]+ {2,}", line)]


def find_layer(path: Path) -> str:
    return path.relative_to(SERVING).with_suffix("").parts[0]


@cache
def imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """Return the imports of a file, at its top or inside a function."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported(path: Path) -> set[str]:
    """Return the full names of the imported modules, and of what is imported from them."""
    names = {alias.name for node in imports(path) if isinstance(node, ast.Import) for alias in node.names}
    members = [node for node in imports(path) if isinstance(node, ast.ImportFrom)]
    return names.union(*({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} for node in members))


def imported_modules(files: Iterable[Path]) -> set[str]:
    """Return the full names of the modules that files import, without relative imports."""
    modules = set()
    for node in (node for file in files for node in imports(file)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif not node.level:
            modules.add(node.module)
    return modules


FILES = [path for path in SERVING.rglob("*.py") if path.parent != SERVING or path.stem != "__init__"]


def test_the_list_of_layers_matches_the_folder() -> None:
    assert set(LAYERS) == {path.stem for path in SERVING.iterdir()} - {"__init__", "__pycache__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SERVING).as_posix())
def test_a_layer_imports_only_from_layers_below(path: Path) -> None:
    layers = {name.split(".")[2] for name in imported(path) if name.startswith("handlers.serving.")}
    assert layers <= set(LAYERS[LAYERS.index(find_layer(path)) :])
    outside = {name.split(".")[1] for name in imported(path) if name.startswith("handlers.")} - {"serving"}
    assert outside <= {"model", "version"}  # declarations of a model, and the version


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SERVING).as_posix())
def test_http_imports_no_torch_and_only_http_imports_starlette(path: Path) -> None:
    libraries = {name.split(".")[0] for name in imported(path)}
    if find_layer(path) == "http":
        assert not libraries & {"torch", "diffusers", "numpy", "PIL"}
    else:
        assert not libraries & {"starlette", "uvicorn", "httptools"}


def test_only_latents_import_the_packages_of_their_extra() -> None:
    """Test that `RemoteVAE` needs no OpenCV, PyAV or fsspec: `remote-vae[latents]` installs them."""
    extra = {"av", "cv2", "fsspec"}
    for path in (ROOT / "remote_vae").glob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & extra, path
    used = {name.split(".")[0] for path in (ROOT / "remote_vae" / "latents").glob("*.py") for name in imported(path)}
    assert used >= extra


def test_imports_have_no_cycle() -> None:
    """Test also imports inside functions. No import may be only for types."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "handlers").rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph = {module: imported(path) & modules.keys() for module, path in modules.items()}
    assert not [module for module, path in modules.items() if "TYPE_CHECKING" in path.read_text()]
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules)
    assert graph["handlers.base"] == {"handlers.model", "handlers.serving.pipeline"}


@pytest.mark.slow
def test_one_private_module_of_torch_is_imported() -> None:
    """Test the only private module of torch that the image's older torch has too."""
    modules = imported_modules(file for folder in MAY_IMPORT for file in (ROOT / folder).rglob("*.py"))
    assert {module for module in modules if module.startswith("torch._")} == {"torch._subclasses"}


def test_models_are_read_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import handlers; print(*handlers.MODELS)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == list(MODELS)


def test_every_folder_is_linted() -> None:
    (sources,) = re.findall(r"^SOURCES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {source.removesuffix(".py") for source in sources.split()} == MAY_IMPORT.keys()


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_allowed_folders(folder: str) -> None:
    modules = imported_modules([ROOT / "handler.py"] if folder == "handler" else (ROOT / folder).rglob("*.py"))
    others = {module.split(".")[0] for module in modules} & MAY_IMPORT.keys() - {folder}
    assert others <= MAY_IMPORT[folder]
