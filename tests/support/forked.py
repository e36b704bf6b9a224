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
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from scripts import local_server
from scripts.local_server import ROOT, start_process

FROM_THE_START = ("HOME", "TMPDIR", "HF_", "OMP_", "PYTHON")
"""Prefixes of variables that a process must have when its imports begin."""

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["torch", "diffusers.models.autoencoders", "av", "cv2", "httpx2", "rich.progress", "safetensors.torch", "uvicorn"]
)


def from_the_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(FROM_THE_START)}


INHERITED = from_the_start(os.environ)
"""Environment of the process that is forked."""


class Process(context.Process):
    """A process of `python -m ...` or `python -c ...` with the methods of `subprocess.Popen` that the tests need."""

    def __init__(
        self, arguments: Sequence[str], environment: dict[str, str], output: Path, errors: Path, folder: Path = ROOT
    ) -> None:
        for path in (output, errors):
            path.write_text("")
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
    sys.path[:] = [folder, *environment.get("PYTHONPATH", "").split(os.pathsep), *others]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("scripts", "tests", "traffic")]:
        del sys.modules[name]  # modules of this project may come from another folder
    option, code, *sys.argv[1:] = arguments
    if option == "-c":
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(code, run_name="__main__", alter_sys=True)


def _end_with(tests: multiprocessing.process.BaseProcess) -> None:
    """End the servers with the tests, which may be killed."""
    tests.join()
    os._exit(1)
