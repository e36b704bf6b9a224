"""The fuzz run: malformed requests, with good requests between them, and their results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from handlers.serving.devices import IDLE_SECONDS
from scripts.local_server import wait_until_checked
from traffic.images import IMAGES
from traffic.ledger import Ledger
from traffic.messages import Address, Hang, NoResponse, Response, send_request
from traffic.mutations import Case, make_case
from traffic.samples import Sample, samples
from traffic.servers import Server
from traffic.truth import Truth, Wrong, check, check_refusal
from traffic.videos import VIDEOS

TIMEOUT = 5.0
"""Seconds within which the server responds to every request."""
FILE_TIMEOUT = 30.0
"""Seconds within which a server with the service's own limits responds to every file."""
GOOD_EVERY = 20
"""Number of requests from one good request to the next."""
IDLE = IDLE_SECONDS + 2
"""Seconds without a request, after which a server has freed the memory that requests used."""
KEPT = 50_000_000
"""Bytes that an idle server may use beyond its memory after the warm-up."""


@dataclass
class Target:
    """A server under test, and the checker of its responses."""

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
    """Servers. The first gets nine requests of ten and the last the others; for files, two of three."""
    seed: int
    files: bool = False
    """True if every request is a file with a mutated structure: images to the first target, videos to the last."""
    ledger: Ledger = field(default_factory=Ledger)

    def target(self, number: int) -> Target:
        turn = 3 if self.files else 10
        return self.targets[-1] if number % turn == turn - 1 else self.targets[0]

    def make_case(self, number: int) -> Case:
        target = self.target(number)
        kinds = (list(VIDEOS) if target.truth.kind == "video" else list(IMAGES)) if self.files else None
        return make_case(target.samples, self.seed, number, kinds)

    def warm_up(self) -> None:
        """Send one good request of each sample, wait for the check of the fast pass, and record the servers' memory."""
        for target in self.targets:
            for sample in target.samples:
                self._send_good(target, sample, 0)
            wait_until_checked(target.server.url)
            target.start = target.server.memory

    def run(self, numbers: Iterable[int], advance: Callable[[], None] = lambda: None) -> None:
        """Send the requests with these numbers, and a good one after every `GOOD_EVERY`, to the targets in turn.

        Raises:
            RuntimeError: a server has died.
        """
        for number in numbers:
            self.send(number)
            turn, remainder = divmod(number, GOOD_EVERY)
            if remainder == 0:
                target = self.targets[turn % len(self.targets)]
                self._send_good(target, target.samples[turn // len(self.targets) % len(target.samples)], number)
                if not target.server.alive:
                    raise RuntimeError(f"the server has died behind request {number}; its log is {target.server.log}")
            advance()

    def send(self, number: int) -> Response | None:
        """Send one request. Return None if no response arrived, or a wrong one."""
        target, case = self.target(number), self.make_case(number)
        return send_case(self.ledger, target.server.address, target.truth, case, self._timeout(target))

    def _timeout(self, target: Target) -> float:
        return FILE_TIMEOUT if target.server.limited else TIMEOUT

    def _send_good(self, target: Target, sample: Sample, number: int) -> None:
        kind = "good, in between"
        self.ledger.send(kind)
        try:
            response = send_request(target.server.address, sample.message.wire(), self._timeout(target))
            check(response, sample.message, target.truth.expected_for_sample(sample), good=True)
        except (NoResponse, Hang, Wrong, ConnectionError) as error:
            self.ledger.fail(kind, f"{sample.name}: {error}", number)
        else:
            self.ledger.end(kind, "200")

    def check_memory(self, kept: int = KEPT) -> list[str]:
        """Record a finding if a server has died, exceeded its limit, or still uses more than `kept` bytes of memory.

        Returns:
            One line for each server, with its memory.
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
        """Record the stack traces in the servers' logs."""
        for target in self.targets:
            for error in target.server.logged_errors():
                self.ledger.find("log", f"{error} in {target.server.log}")


def send_case(
    ledger: Ledger, address: Address, truth: Truth, case: Case, timeout: float, *, busy: bool = False
) -> Response | None:
    """Send a malformed request, check the response, and record the outcome.

    Return None if no response arrived, or a wrong one.

    Args:
        busy: whether the server is busy, so that a 503 is correct.
    """
    ledger.send(case.kind)
    try:
        start = time.monotonic()
        try:
            response = send_request(address, case.wire, timeout, method=case.method, ends=case.ends)
        finally:
            ledger.record_duration(time.monotonic() - start, case.number)
        if busy and response.status == 503:
            check_refusal(response)
        else:
            if case.is_file:
                expected = truth.expected_for_file(case.message.body) if response.status == 200 else None
            else:
                expected = truth.expected_for_message(case.message)
            check(response, case.message, expected, method=case.method, http=case.http)
    except NoResponse as error:
        if case.http:
            ledger.fail(case.kind, str(error), case.number)
        else:
            ledger.end(case.kind, "closed")
    except (Hang, Wrong, ConnectionError) as error:
        ledger.fail(case.kind, str(error), case.number)
    else:
        ledger.end(case.kind, "plain 400" if response.is_plain_refusal else str(response.status))
        return response
    return None
