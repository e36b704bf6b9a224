"""The fuzz run: malformed requests one by one, good ones between them, and what came back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from handlers.serving.devices import IDLE_SECONDS
from traffic.images import IMAGES
from traffic.ledger import Ledger
from traffic.messages import Address, Answer, Hang, NoAnswer, exchange
from traffic.mutations import Case, case
from traffic.samples import Sample, samples
from traffic.servers import Server
from traffic.truth import Truth, Wrong, check, check_refusal
from traffic.videos import VIDEOS

TIMEOUT = 5.0
"""Seconds in which every request is answered."""
FILE_TIMEOUT = 30.0
"""Seconds in which every file is answered by a server with the service's own limits."""
GOOD_EVERY = 20
"""Requests from one good one to the next."""
IDLE = IDLE_SECONDS + 2
"""Seconds without a request, after which a server has given back the memory that requests took."""
KEPT = 50_000_000
"""Bytes that a server may keep then, beside those that it kept after one good request of each sample."""


@dataclass
class Target:
    """A server under attack, and what is right for it."""

    server: Server
    truth: Truth = field(init=False)
    samples: list[Sample] = field(init=False)
    start: int = 0
    """Resident bytes after one good request of each sample."""

    def __post_init__(self) -> None:
        self.truth = Truth(self.server.key, self.server.weights[self.server.key])
        self.samples = samples(self.server.key)


@dataclass
class Fuzz:
    targets: list[Target]
    """The first takes nine requests of ten and the last the others; of files, two of three."""
    seed: int
    files: bool = False
    """Whether every request is a file with a mutated structure: an image to the first target, a video to the last."""
    ledger: Ledger = field(default_factory=Ledger)

    def target(self, number: int) -> Target:
        turn = 3 if self.files else 10
        return self.targets[-1] if number % turn == turn - 1 else self.targets[0]

    def case(self, number: int) -> Case:
        target = self.target(number)
        kinds = (list(VIDEOS) if target.truth.kind == "video" else list(IMAGES)) if self.files else None
        return case(target.samples, self.seed, number, kinds)

    def warm_up(self) -> None:
        """Sends one good request of each sample, and notes what memory the servers have then."""
        for target in self.targets:
            for sample in target.samples:
                self._send_good(target, sample, 0)
            target.start = target.server.memory

    def run(self, numbers: Iterable[int], advance: Callable[[], None] = lambda: None) -> None:
        """Sends the requests with these numbers, and a good one after every `GOOD_EVERY`, to each target by turns.

        Raises:
            RuntimeError: a server has died.
        """
        for number in numbers:
            self.send(number)
            turn, rest = divmod(number, GOOD_EVERY)
            if rest == 0:
                target = self.targets[turn % len(self.targets)]
                self._send_good(target, target.samples[turn // len(self.targets) % len(target.samples)], number)
                if not target.server.alive:
                    raise RuntimeError(f"the server has died behind request {number}; its log is {target.server.log}")
            advance()

    def send(self, number: int) -> Answer | None:
        """Sends one; None where nothing came back, or something wrong."""
        target, made = self.target(number), self.case(number)
        return send_case(self.ledger, target.server.address, target.truth, made, self._timeout(target))

    def _timeout(self, target: Target) -> float:
        return FILE_TIMEOUT if target.server.limited else TIMEOUT

    def _send_good(self, target: Target, sample: Sample, number: int) -> None:
        kind = "good, in between"
        self.ledger.send(kind)
        try:
            answer = exchange(target.server.address, sample.message.wire(), self._timeout(target))
            check(answer, sample.message, target.truth.of_sample(sample), good=True)
        except (NoAnswer, Hang, Wrong, ConnectionError) as error:
            self.ledger.fail(kind, f"{sample.name}: {error}", number)
        else:
            self.ledger.end(kind, "200")

    def check_memory(self, kept: int = KEPT) -> list[str]:
        """Notes it where a server has died, took more than its limit, or keeps more than this of what requests took.

        Returns:
            A line for each server, of the memory it had.
        """
        time.sleep(IDLE)
        lines = []
        for target in self.targets:
            server, key = target.server, target.server.key
            if not server.alive:
                self.ledger.find("memory", f"{key}: the server has died; its log is {server.log}")
                continue
            idle, peak, limit = server.memory, "", None
            if server.limited is not None:
                limit = server.limited.limit
                peak = f"{server.limited.peak / 1e6:.0f} MB at its peak (limit {limit / 1e6:.0f} MB), "
            line = (
                f"{key}: resident memory {target.start / 1e6:.0f} MB after the warm-up, {peak}{idle / 1e6:.0f} MB "
                "when it was idle at the end"
            )
            lines.append(line)
            if idle > target.start + kept or (server.limited is not None and server.limited.peak > limit):
                self.ledger.find("memory", line)
        return lines

    def check_logs(self) -> None:
        """Notes the stack traces in the servers' logs."""
        for target in self.targets:
            for error in target.server.logged_errors():
                self.ledger.find("log", f"{error} in {target.server.log}")


def send_case(
    ledger: Ledger, address: Address, truth: Truth, made: Case, timeout: float, *, busy: bool = False
) -> Answer | None:
    """Sends a malformed request, checks what comes, and notes it; None where nothing came, or something wrong.

    Args:
        busy: whether the server has so much to do that it may refuse the request with 503.
    """
    ledger.send(made.kind)
    try:
        start = time.monotonic()
        try:
            answer = exchange(address, made.wire, timeout, method=made.method, ends=made.ends)
        finally:
            ledger.took(time.monotonic() - start, made.number)
        if busy and answer.status == 503:
            check_refusal(answer)
        else:
            if made.is_file:
                expected = truth.of_file(made.message.body) if answer.status == 200 else None
            else:
                expected = truth.of_message(made.message)
            check(answer, made.message, expected, method=made.method, http=made.http)
    except NoAnswer as error:
        if made.http:
            ledger.fail(made.kind, str(error), made.number)
        else:
            ledger.end(made.kind, "closed")
    except (Hang, Wrong, ConnectionError) as error:
        ledger.fail(made.kind, str(error), made.number)
    else:
        ledger.end(made.kind, "plain 400" if answer.is_plain_refusal else str(answer.status))
        return answer
    return None
