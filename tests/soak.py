"""Mixed traffic for some minutes, then SIGTERM under load: `make soak [MINUTES=10] [TOOLKIT=checkout]`.

Prints what was sent and what came of it, and writes `benchmarks/soak.md`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from benchmarks.bench import BENCHMARKS, about
from scripts.local_server import ROOT
from tests.traffic import report, soak
from tests.traffic.clients import Traffic
from tests.traffic.servers import server

console = Console(highlight=False, markup=False, soft_wrap=True, width=None if Console().is_terminal else 160)


def main(
    minutes: Annotated[float, typer.Option(help="Of traffic.", min=0.1)] = 10,
    seed: Annotated[int, typer.Option(help="Of the malformed requests.")] = 0,
    toolkit: Annotated[
        Path | None, typer.Option(help="Checkout of the Inference Toolkit to serve with.", exists=True)
    ] = None,
) -> None:
    facts = about("cpu")
    torch.set_num_threads(1)  # the other cores are the server's
    columns = TextColumn("soak"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    try:
        folder = Path(tempfile.mkdtemp(prefix="soak-"))
        with server("tiny,hunyuan-video", folder, toolkit) as running:
            traffic = Traffic(running, seed)
            with Progress(*columns, console=console) as progress:
                task = progress.add_task("", total=minutes * 60)
                result = soak.run(traffic, minutes * 60, lambda seconds: progress.update(task, completed=seconds))
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    soak.check_memory(traffic, result)
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
    typer.run(main)
