"""A real server within a memory limit, as in a container: `with limited_server(2 * 10**9, ...) as server`.

The server runs in its own control group (version 1 or 2) and in a private mount namespace. The namespace shows the
group where a container shows its own, so the service reads its limit and its use from the real files. The kernel kills
a server that exceeds the limit. Both need root. Without root, the service gets the value that it would derive from the
limit (`VAE_MAX_IN_FLIGHT_MB`). The system measures `peak` in both cases, and tests compare it with the limit.

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
"""Constants of Linux's sched.h and mount.h."""

numbers = count()


@dataclass
class LimitedServer:
    """A running server and its memory. All sizes are in bytes."""

    url: str
    limit: int
    process: psutil.Process
    group: Path | None
    """Folder of its control group, or None if the system allows none."""

    @property
    def resident(self) -> int:
        """Return the resident memory of the process."""
        return self.process.memory_info().rss

    @property
    def peak(self) -> int:
        """Return the maximum resident memory since the start of the process, or since `reset_peak`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024

    def reset_peak(self) -> None:
        """Reset `peak` to the current memory."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    @property
    def is_alive(self) -> bool:
        """Return whether the process still runs: the kernel has not killed it."""
        return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE


@contextmanager
def limited_server(
    limit: int, *arguments: str, log: Path, command: Sequence[str] = ("-m", "scripts.serve"), **environment: str
) -> Iterator[LimitedServer]:
    """Start a server as `scripts.local_server.serve` does, within a memory limit of `limit` bytes.

    With `limited_server(2 * 10**9, "--model", "tiny", "--weights", "models/tiny", log=log) as server`, `server.url` is
    its address. The server and its group are removed at the end. Until then `is_alive` tells whether the kernel killed
    it.
    """
    group = _make_group(limit)
    if group is None:
        environment = {"VAE_MAX_IN_FLIGHT_MB": str(limit // 8_000_000), **environment}
    name = log.with_suffix(".pid")
    wrapper = ("-m", "traffic.memory_limit", str(name), str(group or ""), *command)
    # A forked process would share the tests' pages, which no group counts.
    environment = {**environment, "PYTHONUNBUFFERED": "1"}
    try:
        with serve(*arguments, log=log, command=wrapper, **environment) as url:
            yield LimitedServer(url, limit, psutil.Process(int(name.read_text())), group)
    finally:
        if group is not None:
            _remove_group(group)


def _make_group(limit: int) -> Path | None:
    """Create a control group with this limit. Return its folder, or None if the system allows none."""
    parent = CGROUP / "memory" if (CGROUP / "memory" / "memory.limit_in_bytes").exists() else CGROUP
    file = "memory.limit_in_bytes" if parent != CGROUP else "memory.max"
    if os.geteuid() or not parent.exists():
        return None
    _remove_old_groups(parent)
    group = parent / f"{PREFIX}{os.getpid()}-{next(numbers)}"
    try:
        if parent == CGROUP:
            with suppress(OSError):  # it may be enabled already
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
    """Remove the groups of tests that were killed."""
    for group in parent.glob(f"{PREFIX}*"):
        if not psutil.pid_exists(int(group.name.removeprefix(PREFIX).split("-")[0])):
            with suppress(OSError):  # its server still runs
                group.rmdir()


def _remove_group(group: Path) -> None:
    """Remove the group. The kernel allows it shortly after its last process has ended."""
    for _ in range(50):
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)
    raise RuntimeError(f"{group} cannot be removed: the server is still in it")


def _enter(group: Path) -> None:
    """Move this process into the group, and mount the group's files where a container has its own."""
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
    """Enter the group, and become `python <command>`."""
    Path(pid_file).write_text(str(os.getpid()))
    if group:
        _enter(Path(group))
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main(*sys.argv[1:])
