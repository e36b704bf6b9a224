"""Send hostile and heavy traffic to servers on this machine: `make fuzz` and `make soak`."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from benchmarks.bench import BENCHMARKS, about
from scripts.local_server import ROOT
from traffic import report
from traffic import soak as soak_run
from traffic.clients import Traffic
from traffic.fuzz import Fuzz, Target
from traffic.servers import server

app = typer.Typer(add_completion=False)

console = Console(highlight=False, markup=False, soft_wrap=True, width=None if Console().is_terminal else 160)


class Kind(StrEnum):
    ALL = "all"
    FILES = "files"


@app.command()
def fuzz(
    count: Annotated[int, typer.Option(help="Requests to send.", min=100)] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the requests.")] = 0,
    kind: Annotated[Kind, typer.Option(help="Every kind of request, or files with a mutated structure.")] = Kind.ALL,
    memory_mb: Annotated[
        int | None, typer.Option(help="Memory of each server, in megabytes; without a limit by default.", min=1000)
    ] = None,
    only: Annotated[int | None, typer.Option(help="Send the request with this number alone, and show it.")] = None,
    toolkit: Annotated[
        Path | None, typer.Option(help="Checkout of the Inference Toolkit to serve with.", exists=True)
    ] = None,
) -> None:
    """Send malformed requests, one after another.

    `tiny` gets nine of ten requests and a small video model the others. With --kind=files every request is an image or
    a
    video file with a mutated structure. With --memory-mb each server has a memory limit, and must free the memory that
    requests used.
    """
    torch.set_num_threads(1)  # leave the other cores to the servers
    memory = None if memory_mb is None else memory_mb * 10**6
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with ExitStack() as servers:
            targets = [
                Target(servers.enter_context(server(key, folder / key, toolkit, memory)))
                for key in ("tiny", "hunyuan-video")
            ]
            run = Fuzz(targets, seed, files=kind is Kind.FILES)
            show(run, only) if only is not None else run_all(run, count)
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    if broken := report.summary(run.ledger):
        options = (f"KIND={kind} " if kind is Kind.FILES else "") + (f"MEMORY_MB={memory_mb} " if memory_mb else "")
        raise SystemExit(f"error: {broken}; to send one again: make fuzz {options}SEED={seed} ONLY=<number>")


def run_all(fuzz: Fuzz, count: int) -> None:
    columns = TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=count)
        fuzz.warm_up()
        fuzz.run(range(count), lambda: progress.advance(task))
    lines = fuzz.check_memory()
    fuzz.check_logs()
    console.print(report.console_table(report.rows(fuzz.ledger)))
    for line in lines:
        console.print(line)
    seconds, number = fuzz.ledger.slowest
    console.print(f"the slowest request, {number}, took {seconds:.1f} s")
    for finding in fuzz.ledger.findings[: report.SHOWN]:
        console.print(f"broken: {finding.describe()}")


def show(fuzz: Fuzz, number: int) -> None:
    """Send one request. Print the request and the response."""
    case = fuzz.make_case(number)
    console.print(f"request {number}, {case.kind}, {len(case.wire)} bytes:\n{case.wire[:2000]!r}")
    response = fuzz.send(number)
    if response is not None:
        console.print(f"response: {response.status} {response.headers}\n{response.body[:2000]!r}")
    fuzz.check_logs()


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(help="Minutes of traffic.", min=0.1)] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the malformed requests.")] = 0,
    toolkit: Annotated[
        Path | None, typer.Option(help="Checkout of the Inference Toolkit to serve with.", exists=True)
    ] = None,
) -> None:
    """Send mixed traffic for some minutes, then SIGTERM under load. Write benchmarks/soak.md."""
    facts = about("cpu")
    torch.set_num_threads(1)  # leave the other cores to the server
    columns = TextColumn("soak"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    try:
        folder = Path(tempfile.mkdtemp(prefix="soak-"))
        with server("tiny,hunyuan-video", folder, toolkit) as running:
            traffic = Traffic(running, seed)
            with Progress(*columns, console=console) as progress:
                task = progress.add_task("", total=minutes * 60)
                result = soak_run.run(traffic, minutes * 60, lambda seconds: progress.update(task, completed=seconds))
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    soak_run.check_memory(traffic, result)
    console.print(report.console_table(report.rows(traffic.ledger)))
    path = BENCHMARKS / ("soak.md" if toolkit is None else "soak-toolkit.md")
    path.write_text(report.soak_page(traffic.ledger, result, facts, toolkit is not None))
    for line in (report.memory_line(result), report.throughput_line(result), report.end_line(result)):
        console.print(line)
    console.print(f"Written to {path.relative_to(ROOT)}")
    for finding in traffic.ledger.findings[: report.SHOWN]:
        console.print(f"broken: {finding.describe()}")
    if broken := report.summary(traffic.ledger):
        raise SystemExit(f"error: {broken}")


if __name__ == "__main__":
    app()
