"""Whether a server's resident memory grows."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Memory:
    """Samples over a run."""

    samples: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, and resident bytes."""

    def add(self, when: float, resident: int) -> None:
        self.samples.append((when, resident))

    def halves(self) -> tuple[int, int]:
        """The most bytes in the first half of the run, and in the second."""
        middle = self.samples[-1][0] / 2
        first = max(resident for when, resident in self.samples if when <= middle)
        return first, max(resident for when, resident in self.samples if when > middle)
