"""Whether a server's resident memory grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median


@dataclass
class Memory:
    """Samples over a run."""

    samples: list[tuple[float, int]] = field(default_factory=list)
    """When (seconds, or requests), and resident bytes."""

    def add(self, when: float, resident: int) -> None:
        self.samples.append((when, resident))

    def medians(self, warm_up: float, span: float) -> tuple[float, float]:
        """Bytes after the warm-up and at the end, each over a span; both in what the samples are counted in."""
        end = self.samples[-1][0]
        before = [resident for when, resident in self.samples if warm_up <= when <= warm_up + span]
        after = [resident for when, resident in self.samples if when >= end - span]
        return median(before), median(after)

    def halves(self) -> tuple[int, int]:
        """The most bytes in the first half of the run, and in the second."""
        middle = self.samples[-1][0] / 2
        first = max(resident for when, resident in self.samples if when <= middle)
        return first, max(resident for when, resident in self.samples if when > middle)
