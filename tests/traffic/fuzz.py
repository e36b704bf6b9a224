"""The fuzz run: malformed requests one by one, good ones between them, and what came back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tests.traffic.ledger import Ledger
from tests.traffic.memory import Memory
from tests.traffic.messages import Address, Answer, Hang, NoAnswer, exchange
from tests.traffic.mutations import Case, case
from tests.traffic.samples import Sample, samples
from tests.traffic.servers import Server
from tests.traffic.truth import Truth, Wrong, check, check_refusal

TIMEOUT = 5.0
"""Seconds in which every request is answered."""
GOOD_EVERY = 20
"""Requests from one good one to the next."""
WARM_UP = 0.5
SPAN = 0.1
"""Of the run; memory is compared between the span after the warm-up and the last one."""
GROWTH = 0.05
"""Of the resident memory, at most."""


@dataclass
class Target:
    """A server under attack, and what is right for it."""

    server: Server
    truth: Truth = field(init=False)
    samples: list[Sample] = field(init=False)
    memory: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        self.truth = Truth(self.server.key, self.server.weights[self.server.key])
        self.samples = samples(self.server.key)


@dataclass
class Fuzz:
    targets: list[Target]
    """The first takes nine requests of ten, the last the others."""
    seed: int
    ledger: Ledger = field(default_factory=Ledger)

    def target(self, number: int) -> Target:
        return self.targets[-1] if number % 10 == 9 else self.targets[0]

    def case(self, number: int) -> Case:
        return case(self.target(number).samples, self.seed, number)

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
                target.memory.add(number, target.server.memory)
            advance()

    def send(self, number: int) -> Answer | None:
        """Sends one; None where nothing came back, or something wrong."""
        target = self.target(number)
        return send_case(self.ledger, target.server.address, target.truth, self.case(number), TIMEOUT)

    def _send_good(self, target: Target, sample: Sample, number: int) -> None:
        kind = "good, in between"
        self.ledger.send(kind)
        try:
            answer = exchange(target.server.address, sample.message.wire(), TIMEOUT)
            check(answer, sample.message, target.truth.of_sample(sample), good=True)
        except (NoAnswer, Hang, Wrong, ConnectionError) as error:
            self.ledger.fail(kind, f"{sample.name}: {error}", number)
        else:
            self.ledger.end(kind, "200")

    def memory_of(self, target: Target) -> tuple[float, float]:
        """Bytes after the warm-up and at the end."""
        end = target.memory.samples[-1][0]
        return target.memory.medians(WARM_UP * end, SPAN * end)

    def check_memory(self, growth: float = GROWTH) -> None:
        """Notes it where a server's memory grew by more than this share."""
        for target in self.targets:
            before, after = self.memory_of(target)
            if after > before * (1 + growth):
                self.ledger.find("memory", f"{target.server.key}: {before / 1e6:.0f} MB grew to {after / 1e6:.0f} MB")

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
        answer = exchange(address, made.wire, timeout, method=made.method, ends=made.ends)
        if busy and answer.status == 503:
            check_refusal(answer)
        else:
            check(answer, made.message, truth.of_message(made.message), method=made.method, http=made.http)
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
