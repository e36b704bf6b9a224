"""Growth of a server's resident memory."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Memory:
    """Samples of resident memory over a run."""

    samples: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, and resident bytes."""

    def add(self, when: float, resident: int) -> None:
        self.samples.append((when, resident))

    def halves(self) -> tuple[int, int]:
        """Return the maximum in the first half of the run, and in the second, in bytes."""
        middle = self.samples[-1][0] / 2
        first = max(resident for when, resident in self.samples if when <= middle)
        return first, max(resident for when, resident in self.samples if when > middle)
