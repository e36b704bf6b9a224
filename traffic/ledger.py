"""Counts of requests and outcomes, by kind."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A defect that a run has found."""

    kind: str
    text: str
    number: int | None = None
    """Number of the fuzz generator's request."""

    def describe(self) -> str:
        return f"{self.kind}{'' if self.number is None else f' (request {self.number})'}: {self.text}"


class Ledger:
    """Thread-safe counts. A request without an outcome is lost."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sent: Counter[str] = Counter()
        self.outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.findings: list[Finding] = []
        self.slowest = (0.0, 0)
        """Seconds and number of the slowest malformed request."""

    def send(self, kind: str) -> None:
        with self._lock:
            self.sent[kind] += 1

    def end(self, kind: str, outcome: str) -> None:
        """Record an outcome: a status, or a word if there was no response."""
        with self._lock:
            self.outcomes[kind][outcome] += 1

    def fail(self, kind: str, text: str, number: int | None = None) -> None:
        """Record a request with a wrong outcome."""
        with self._lock:
            self.outcomes[kind]["broken"] += 1
            self.findings.append(Finding(kind, text, number))

    def record_duration(self, seconds: float, number: int) -> None:
        """Record the duration of a malformed request."""
        with self._lock:
            self.slowest = max(self.slowest, (seconds, number))

    def find(self, kind: str, text: str) -> None:
        """Record a finding that belongs to no request."""
        with self._lock:
            self.findings.append(Finding(kind, text))

    @property
    def lost(self) -> dict[str, int]:
        """Return the number of requests without an outcome, by kind."""
        missing = {kind: sent - self.outcomes[kind].total() for kind, sent in self.sent.items()}
        return {kind: count for kind, count in missing.items() if count}
