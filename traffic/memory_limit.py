"""A real server in a memory limit, as in a container of that size: `with limited_server(2 * 10**9, ...) as server`.

The server runs in a control group of its own (version 1 or 2) and in a private mount namespace that shows it the group
where a container shows its own, so the service reads its limit and what it uses from the real files. The kernel kills
it when it takes more. Both need root. Elsewhere the service is told what it would derive from the limit
(`VAE_MAX_IN_FLIGHT_MB`), and `peak`, which the system measures either way, is what a test compares with the limit.

Started as a module, this file is the server's process: it enters the group and becomes `python <arguments>`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psutil

from scripts.local_server import serve

CGROUP = Path("/sys/fs/cgroup")
PREFIX = "vae-tests-"
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000
"""Of Linux's sched.h and mount.h."""

numbers = count()


@dataclass
class LimitedServer:
    """A running server and what it takes. All sizes are bytes."""

    url: str
    limit: int
    process: psutil.Process
    group: Path | None
    """The folder of its control group; None where none could be made."""

    @property
    def resident(self) -> int:
        """Resident memory of the process now."""
        return self.process.memory_info().rss

    @property
    def peak(self) -> int:
        """The most resident memory of the process since its start, or since `reset_peak`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024

    def reset_peak(self) -> None:
        """Have `peak` begin anew."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    @property
    def is_alive(self) -> bool:
        """Whether the process that was started still runs: the kernel has not killed it."""
        return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE


@contextmanager
def limited_server(
    limit: int, *arguments: str, log: Path, command: Sequence[str] = ("-m", "scripts.serve"), **environment: str
) -> Iterator[LimitedServer]:
    """Start a server as `scripts.local_server.serve` does, in a memory limit of so many bytes.

    With `limited_server(2 * 10**9, "--model", "tiny", "--weights", "models/tiny", log=log) as server`, `server.url` is
    its address. At the end the server and its group are gone. `is_alive` tells whether it was killed before that.
    """
    group = _make_group(limit)
    if group is None:
        environment = {"VAE_MAX_IN_FLIGHT_MB": str(limit // 8_000_000), **environment}
    name = log.with_suffix(".pid")
    wrapper = ("-m", "traffic.memory_limit", str(name), str(group or ""), *command)
    # A process from the start: one forked from the tests' has their pages, which no group counts.
    environment = {**environment, "PYTHONUNBUFFERED": "1"}
    try:
        with serve(*arguments, log=log, command=wrapper, **environment) as url:
            yield LimitedServer(url, limit, psutil.Process(int(name.read_text())), group)
    finally:
        if group is not None:
            _remove_group(group)


def _make_group(limit: int) -> Path | None:
    """The folder of a new control group with this limit, or None where the system allows none."""
    parent = CGROUP / "memory" if (CGROUP / "memory" / "memory.limit_in_bytes").exists() else CGROUP
    file = "memory.limit_in_bytes" if parent != CGROUP else "memory.max"
    if os.geteuid() or not parent.exists():
        return None
    _remove_old_groups(parent)
    group = parent / f"{PREFIX}{os.getpid()}-{next(numbers)}"
    try:
        if parent == CGROUP:
            with suppress(OSError):  # it may be on already
                (parent / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
    except OSError:
        return None
    try:
        (group / file).write_text(str(limit))
        if parent == CGROUP:
            (group / "memory.swap.max").write_text("0")
        else:
            (group / "memory.swappiness").write_text("0")
    except OSError:
        if not (group / file).exists() or (group / file).read_text().strip() == "max":
            group.rmdir()
            return None
    return group


def _remove_old_groups(parent: Path) -> None:
    """Those of tests that were killed."""
    for group in parent.glob(f"{PREFIX}*"):
        if not psutil.pid_exists(int(group.name.removeprefix(PREFIX).split("-")[0])):
            with suppress(OSError):  # a server is still in it
                group.rmdir()


def _remove_group(group: Path) -> None:
    """The kernel lets a group go shortly after its last process has ended."""
    for _ in range(50):
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)
    raise RuntimeError(f"{group} cannot be removed: the server is still in it")


def _enter(group: Path) -> None:
    """Move this process into the group, and show it the group's files where a container has its own."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    libc = ctypes.CDLL(None, use_errno=True)
    for failed in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),
        libc.mount(bytes(group), bytes(group.parent), None, MS_BIND, None),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), "the control group cannot be mounted")


def main(pid_file: str, group: str, *command: str) -> None:
    """Become `python <command>` within the group."""
    Path(pid_file).write_text(str(os.getpid()))
    if group:
        _enter(Path(group))
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main(*sys.argv[1:])
