"""Processes forked from a process that has imported torch and diffusers, which takes 5 s of CPU.

Each has its own arguments, environment, folder and output.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory

from scripts import local_server
from scripts.local_server import ROOT, start_process

FROM_THE_START = ("HOME", "TMPDIR", "HF_", "OMP_", "PYTHON")
"""Prefixes of variables that a process must have when its imports begin."""
LATER = ("HF_MODEL_DIR", "PYTHONSAFEPATH")
"""Variables with these prefixes that a forked process can have: the toolkit reads the first, `_run` the second."""
IMPORTED = (
    "av",
    "cv2",
    "diffusers.image_processor",
    "diffusers.models.autoencoders",
    "einops",
    "fsspec",
    "httpx2",
    "rich.logging",
    "rich.progress",
    "safetensors.torch",
    "tests.support.forked",
    "typer",
    "uvicorn.protocols.http.httptools_impl",
    "handlers.serving.http.app",
    "handlers.serving.pipeline",
    "remote_vae.files",
    "remote_vae.latents.formats",
    "remote_vae.latents.run",
    "remote_vae.proxy",
    "remote_vae.vae",
    "scripts.connections",
)
"""Modules that a process has from the fork: packages, and this project's own, but none that reads its environment."""
OWN = ("benchmarks", "handlers", "prometheus_client", "remote_vae", "scripts", "tests", "traffic")
"""Packages that a process imports anew if it runs another copy of the project. The metrics are those of one copy."""

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(list(IMPORTED))


@cache
def prepare() -> None:
    """Start the process that is forked, in the project's folder, from which it imports."""
    with chdir(ROOT):
        forkserver.ensure_running()


def from_the_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(FROM_THE_START) and name not in LATER}


INHERITED = from_the_start(os.environ)
"""Environment of the process that is forked."""


class Process(context.Process):
    """A process of `python -m ...` or `python -c ...` with the methods of `subprocess.Popen` that the tests need."""

    def __init__(
        self, arguments: Sequence[str], environment: dict[str, str], output: Path, errors: Path, folder: Path = ROOT
    ) -> None:
        for path in (output, errors):
            path.write_text("")
        prepare()
        super().__init__(target=_run, args=(list(arguments), environment, str(output), str(errors), str(folder)))
        self.start()

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float) -> int:
        """Return the exit status. Kill a process that does not end in time: Python would wait for it at exit."""
        self.join(timeout)
        if self.exitcode is None:
            self.kill()
            self.join()
            raise subprocess.TimeoutExpired(self.name, timeout)
        return self.exitcode


def start(arguments: Sequence[str], log: Path, environment: dict[str, str]) -> Process | subprocess.Popen:
    """Start a process in the way of `local_server.start_process`.

    A server runs diffusers' own pass unless `environment` says otherwise. CUDA does not run in a forked process.
    """
    environment = {"VAE_FAST": os.environ["VAE_FAST"], **environment}
    if from_the_start(environment) != INHERITED or environment.get("VAE_DEVICE", "").startswith("cuda"):
        return start_process(arguments, log, environment)
    return Process(arguments, environment, log, log, local_server.ROOT)


def run(*arguments: object, folder: Path = ROOT, timeout: float = 120, **environment: str) -> tuple[int, str, str]:
    """Run a process. Return its status, standard output and standard error."""
    with TemporaryDirectory() as temporary:
        output, errors = Path(temporary, "output"), Path(temporary, "errors")
        assert from_the_start(environment).keys() <= {"PYTHONPATH"}, "this needs a process from the start"
        process = Process(list(map(str, arguments)), {**os.environ, **environment}, output, errors, folder)
        status = process.wait(timeout)
        return status, output.read_text(errors="replace"), errors.read_text()


@contextmanager
def killed_at_the_end(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Kill a process at the end of the block."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def _run(arguments: list[str], environment: dict[str, str], output: str, errors: str, folder: str) -> None:
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    for stream, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    others = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    added = [] if environment.get("PYTHONSAFEPATH") else [folder]
    added += filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [*added, *others]
    if Path(folder).resolve() != ROOT or {"PYTHONSAFEPATH", "VAE_REPOSITORY"} & environment.keys():
        for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
            del sys.modules[name]
    option, code, *sys.argv[1:] = arguments
    if option == "-c":
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(code, run_name="__main__", alter_sys=True)


def _end_with(tests: multiprocessing.process.BaseProcess) -> None:
    """End the servers with the tests, which may be killed."""
    tests.join()
    os._exit(1)
