"""Malformed requests against servers on this machine.

`make fuzz [COUNT=10000] [SEED=0] [KIND=files] [MEMORY_MB=2000] [ONLY=n] [TOOLKIT=checkout]`

`tiny` takes nine of ten, and a video model with few channels and random weights the others, for its MP4 files. With
`KIND=files` every request is an image or a video with a mutated structure. With `MEMORY_MB` each server has so much
memory, as in a container of that size, and must give back what it took. Each request follows from the seed and its
number, so `ONLY=n` sends one again and shows the response.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.traffic import report
from tests.traffic.fuzz import Fuzz, Target
from tests.traffic.servers import server

console = Console(highlight=False, markup=False, soft_wrap=True, width=None if Console().is_terminal else 160)


class Kind(StrEnum):
    ALL = "all"
    FILES = "files"


def main(
    count: Annotated[int, typer.Option(help="Requests to send.", min=100)] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
    kind: Annotated[Kind, typer.Option(help="Every kind of request, or files with a mutated structure.")] = Kind.ALL,
    memory_mb: Annotated[
        int | None, typer.Option(help="Memory of each server, in megabytes; without a limit by default.", min=1000)
    ] = None,
    only: Annotated[int | None, typer.Option(help="Send the request with this number alone, and show it.")] = None,
    toolkit: Annotated[
        Path | None, typer.Option(help="Checkout of the Inference Toolkit to serve with.", exists=True)
    ] = None,
) -> None:
    torch.set_num_threads(1)  # the other cores are the servers'
    memory = None if memory_mb is None else memory_mb * 10**6
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with ExitStack() as servers:
            targets = [
                Target(servers.enter_context(server(key, folder / key, toolkit, memory)))
                for key in ("tiny", "hunyuan-video")
            ]
            fuzz = Fuzz(targets, seed, files=kind is Kind.FILES)
            show(fuzz, only) if only is not None else run(fuzz, count)
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    if broken := report.summary(fuzz.ledger):
        options = (f"KIND={kind} " if kind is Kind.FILES else "") + (f"MEMORY_MB={memory_mb} " if memory_mb else "")
        raise SystemExit(f"error: {broken}; to send one again: make fuzz {options}SEED={seed} ONLY=<number>")


def run(fuzz: Fuzz, count: int) -> None:
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
    """Sends one, and prints both sides of it."""
    made = fuzz.case(number)
    console.print(f"request {number}, {made.kind}, {len(made.wire)} bytes:\n{made.wire[:2000]!r}")
    answer = fuzz.send(number)
    if answer is not None:
        console.print(f"answer: {answer.status} {answer.headers}\n{answer.body[:2000]!r}")
    fuzz.check_logs()


if __name__ == "__main__":
    typer.run(main)
