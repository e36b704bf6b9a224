"""Results as tables, for the console and in Markdown."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from traffic.ledger import Ledger
from traffic.soak import Result

SHOWN = 20
"""Number of findings on the console."""


def rows(ledger: Ledger) -> list[list[str]]:
    """Return a row for each kind and one for all. The first row has the names of the columns."""
    outcomes = sorted({outcome for counts in ledger.outcomes.values() for outcome in counts})
    kinds = sorted(ledger.sent, key=str.lower)
    table = [["kind", "sent", *outcomes]]
    for kind in kinds:
        table.append([kind, *_cells([ledger.sent[kind], *(ledger.outcomes[kind][outcome] for outcome in outcomes)])])
    sums = [sum(ledger.outcomes[kind][outcome] for kind in kinds) for outcome in outcomes]
    return [*table, ["all", *_cells([ledger.sent.total(), *sums])]]


def _cells(counts: list[int]) -> list[str]:
    return [f"{count:,}" if count else "" for count in counts]


def console_table(table: list[list[str]]) -> Table:
    columns, *body, last = table
    printed = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        printed.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    for row in body:
        printed.add_row(*row)
    printed.add_row(*last, style="bold")
    return printed


def markdown_table(table: list[list[str]]) -> str:
    columns, *body = table
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *body))


def summary(ledger: Ledger) -> str:
    """Summarize the findings in one line. Return "" if there is none."""
    if ledger.findings:
        return f"{len(ledger.findings)} broke; the first: {ledger.findings[0].describe()}"
    if ledger.lost:
        return "requests without an outcome: " + ", ".join(f"{kind} {count}" for kind, count in ledger.lost.items())
    return ""


def memory_line(result: Result) -> str:
    before, after = result.memory
    return (
        f"Resident memory: at most {before / 1e6:.0f} MB in the first half, {after / 1e6:.0f} MB in the second, "
        f"{after / before - 1:+.1%}."
    )


def throughput_line(result: Result) -> str:
    (few, right), (crowd, crowd_right) = result.throughput.items()
    return (
        f"Correct responses a second: {right:.1f} to {few} clients, {crowd_right:.1f} to {crowd} "
        f"({crowd_right / right:.2f}); each sends again as soon as it has a response or a refusal."
    )


def end_line(result: Result) -> str:
    return f"The process ended {result.exit_seconds:.1f} s after SIGTERM."


def soak_page(ledger: Ledger, result: Result, about: dict[str, Any], toolkit: bool) -> str:
    """Return the text of `benchmarks/soak.md`."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    command = f"make soak MINUTES={result.seconds / 60:g}" + (" TOOLKIT=<checkout>" if toolkit else "")
    ended = sum(counts.total() for counts in ledger.outcomes.values())
    verdict = summary(ledger) or "Nothing broke"
    served = "the Inference Toolkit" if toolkit else "`make serve`"
    return f"""# Soak: {about["device"]}

Written by `{command}` on {about["date"]}, at commit {about["commit"]}: {result.seconds:.0f} s of mixed traffic against
a service of `tiny` and a small `hunyuan-video` under {served}, with a queue of 16. {versions}.

**{verdict}.** {ledger.sent.total():,} requests were sent, and {ended:,} got a response or ended as in the table. Each
response to a good request was compared with plain diffusers.

{memory_line(result)} {end_line(result)}

{throughput_line(result)}

{markdown_table(rows(ledger))}

"closed" is a connection that sent no HTTP and that the server closed. "plain 400" is uvicorn's response to no HTTP.
"abandoned" is a client that disconnected, and "refused" a connection that a stopping server did not accept. `health`
was requested all the time. Bursts are 200 connections at once. 503 is a full queue, or a stopping server.
"""
