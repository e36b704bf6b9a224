"""What was sent and what came of it, by kind."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something that broke."""

    kind: str
    text: str
    number: int | None = None
    """Of the fuzz generator's request."""

    def describe(self) -> str:
        return f"{self.kind}{'' if self.number is None else f' (request {self.number})'}: {self.text}"


class Ledger:
    """Counts for many threads. Every request that is sent ends in one outcome, or else it was lost."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sent: Counter[str] = Counter()
        self.outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.findings: list[Finding] = []
        self.slowest = (0.0, 0)
        """Seconds of the malformed request that took longest, and its number."""

    def send(self, kind: str) -> None:
        with self._lock:
            self.sent[kind] += 1

    def end(self, kind: str, outcome: str) -> None:
        """`outcome` is a status, or how it ended without one."""
        with self._lock:
            self.outcomes[kind][outcome] += 1

    def fail(self, kind: str, text: str, number: int | None = None) -> None:
        """The request ended as it must not."""
        with self._lock:
            self.outcomes[kind]["broken"] += 1
            self.findings.append(Finding(kind, text, number))

    def took(self, seconds: float, number: int) -> None:
        """A malformed request has taken so long."""
        with self._lock:
            self.slowest = max(self.slowest, (seconds, number))

    def find(self, kind: str, text: str) -> None:
        """Something else than a request broke."""
        with self._lock:
            self.findings.append(Finding(kind, text))

    @property
    def lost(self) -> dict[str, int]:
        """Requests without an outcome, by kind."""
        missing = {kind: sent - self.outcomes[kind].total() for kind, sent in self.sent.items()}
        return {kind: count for kind, count in missing.items() if count}
