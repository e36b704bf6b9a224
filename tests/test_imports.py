"""The way of a request runs in one direction, and so do the parts of the project; models are read without torch."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from handlers import MODELS, serving
from scripts.local_server import ROOT

MAY_IMPORT = {
    "handlers": set(),
    "handler": {"handlers"},
    "remote_vae": set(),
    "clients": {"remote_vae"},
    "scripts": {"handler", "handlers", "remote_vae"},
    "benchmarks": {"handlers", "remote_vae", "scripts"},
    "tests": {"handlers", "remote_vae", "clients", "scripts", "benchmarks"},
}
"""What each part of the project knows of the others: what is deployed or installed by itself, nothing around it."""
STAGES = [line.split()[0] for line in serving.__doc__.splitlines()[2:] if line.strip()]


def imported_stages(stage: str) -> set[str]:
    tree = ast.parse((ROOT / "handlers" / "serving" / f"{stage}.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "handlers.serving":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("handlers.serving."):
            names.add(node.module.split(".")[2])
    return names


def test_the_list_of_stages_is_the_folder() -> None:
    assert set(STAGES) == {path.stem for path in (ROOT / "handlers" / "serving").glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_only_from_those_below_it(stage: str) -> None:
    assert imported_stages(stage) <= set(STAGES[STAGES.index(stage) + 1 :])


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_needs_the_handlers_that_use_it(stage: str) -> None:
    tree = ast.parse((ROOT / "handlers" / "serving" / f"{stage}.py").read_text())
    at_run_time = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module for node in at_run_time if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in at_run_time if isinstance(node, ast.Import) for alias in node.names}
    outside = {name for name in modules if name.startswith("handlers") and not name.startswith("handlers.serving")}
    assert outside <= {"handlers.model", "handlers.version"}  # what a model declares, and of which version it all is


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


def test_http_knows_no_torch_and_the_vae_no_http() -> None:
    http = {"app", "callers", "exchange", "access_log"}
    for stage in STAGES:
        text = (ROOT / "handlers" / "serving" / f"{stage}.py").read_text()
        assert ("starlette" in text) is (stage in http), stage
        assert stage not in http or "torch" not in text


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
