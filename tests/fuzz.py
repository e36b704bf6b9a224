"""Malformed requests against servers on this machine: `make fuzz [COUNT=10000] [SEED=0] [ONLY=n] [TOOLKIT=checkout]`.

`tiny` takes nine of ten, and a video model with few channels and random weights the others, for its MP4 files. Each
request follows from the seed and its number, so `ONLY=n` sends one again and shows what came.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
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


def main(
    count: Annotated[int, typer.Option(help="Requests to send.", min=500)] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
    only: Annotated[int | None, typer.Option(help="Send the request with this number alone, and show it.")] = None,
    toolkit: Annotated[
        Path | None, typer.Option(help="Checkout of the Inference Toolkit to serve with.", exists=True)
    ] = None,
) -> None:
    torch.set_num_threads(1)  # the other cores are the servers'
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with ExitStack() as servers:
            targets = [
                Target(servers.enter_context(server(key, folder / key, toolkit))) for key in ("tiny", "hunyuan-video")
            ]
            fuzz = Fuzz(targets, seed)
            show(fuzz, only) if only is not None else run(fuzz, count)
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    if broken := report.summary(fuzz.ledger):
        raise SystemExit(f"error: {broken}; to send one again: make fuzz SEED={seed} ONLY=<number>")


def run(fuzz: Fuzz, count: int) -> None:
    columns = TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=count)
        fuzz.run(range(count), lambda: progress.advance(task))
    fuzz.check_memory()
    fuzz.check_logs()
    console.print(report.console_table(report.rows(fuzz.ledger)))
    for target in fuzz.targets:
        before, after = (f"{size / 1e6:.0f} MB" for size in fuzz.memory_of(target))
        console.print(f"{target.server.key}: resident memory {before} after the warm-up, {after} at the end")
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
