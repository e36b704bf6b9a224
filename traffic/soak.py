"""The soak: mixed traffic for a time, then SIGTERM under load."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import psutil

from traffic.clients import CLIENTS, CROWD, HEALTH, HEALTH_TIMEOUT, TIMEOUT, Good, Traffic
from traffic.memory import Memory
from traffic.messages import Connection, Hang, Message, NoAnswer, exchange
from traffic.truth import Wrong, check_error

EXIT_TIME = 30.0
"""Seconds from SIGTERM to the end of the process; Kubernetes kills it then."""
GROWTH = 0.2
"""By which the second half's highest resident memory may be above the first half's: both see many random sizes."""
FEW = 8
"""Clients whose throughput that of a crowd is compared with."""
IN_FLIGHT = 32
"""Requests at SIGTERM: twice as many as the queue takes."""
NOTICE = 1.0
"""Seconds in which the server may not have seen its SIGTERM yet."""


@dataclass(frozen=True)
class Result:
    seconds: float
    """Of the traffic before SIGTERM."""
    throughput: dict[int, float]
    """Right answers a second, by the number of clients."""
    memory: tuple[int, int]
    """The most bytes in the first half of the traffic, and in the second."""
    exit_seconds: float
    """From SIGTERM."""


def throughput(traffic: Traffic, clients: int, seconds: float) -> float:
    """Right answers a second to clients each of which sends again as soon as it has its answer, or is refused."""
    kind, good, end = f"throughput: {clients} clients", traffic.goods[0], time.monotonic() + seconds

    def keep_sending(_: int) -> None:
        with Connection(traffic.address, TIMEOUT) as connection:
            while time.monotonic() < end:
                traffic.ledger.send(kind)
                connection.send(good.message.wire(close=False))
                traffic.settle(kind, connection, good)

    start, before = time.monotonic(), traffic.ledger.outcomes[kind]["200"]
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(keep_sending, range(clients)))
    return (traffic.ledger.outcomes[kind]["200"] - before) / (time.monotonic() - start)


def run(traffic: Traffic, seconds: float, advance: Callable[[float], None] = lambda _: None) -> Result:
    """Few clients, a crowd, then mixed traffic for so long, then SIGTERM under load; what broke is in the ledger."""
    rates = {clients: throughput(traffic, clients, min(10, seconds / 10)) for clients in (FEW, CROWD)}
    memory, threads = Memory(), [threading.Thread(target=traffic.keep, args=(client,)) for client in CLIENTS]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        while (now := time.monotonic() - start) < seconds and traffic.server.alive:
            memory.add(now, traffic.server.memory)
            advance(now)
            time.sleep(min(1, seconds / 100))
    finally:
        traffic.over.set()
        for thread in threads:
            thread.join()
    if not traffic.server.alive:
        raise RuntimeError(f"the server has died; its log is {traffic.server.log}")
    exit_seconds = end(traffic)
    for error in traffic.server.logged_errors():
        traffic.ledger.find("log", f"{error} in {traffic.server.log}")
    return Result(seconds, rates, memory.halves(), exit_seconds)


def check_memory(traffic: Traffic, result: Result, growth: float = GROWTH) -> None:
    """Notes it where the memory grew by more than this share."""
    before, after = result.memory
    if after > before * (1 + growth):
        traffic.ledger.find("memory", f"{before / 1e6:.0f} MB grew to {after / 1e6:.0f} MB")


def end(traffic: Traffic) -> float:
    """SIGTERM while requests wait and run, and one client is slow, and one stalls; seconds until the process was gone.

    Whoever was in gets an answer, 503 or 408 where the request cannot be finished. Whoever comes later is refused, and
    `/health` is no success any more.
    """
    ledger, good = traffic.ledger, traffic.large
    half = len(good.message.body) // 2
    with ExitStack() as stack, ThreadPoolExecutor(IN_FLIGHT + 2) as receivers:
        connections = [stack.enter_context(Connection(traffic.address, TIMEOUT)) for _ in range(IN_FLIGHT + 2)]
        *waiting, slow, stalled = connections
        for connection in waiting:
            ledger.send("SIGTERM: in flight")
            connection.send(good.message.wire())
        for kind, connection in (("SIGTERM: slow body", slow), ("SIGTERM: stalled body", stalled)):
            ledger.send(kind)
            connection.send(good.message.head() + good.message.body[:half])
        exchange(traffic.address, HEALTH.wire(), TIMEOUT, method="GET")  # it has taken those connections by then,
        time.sleep(0.5)  # and read them
        start = time.monotonic()
        traffic.server.process.send_signal(signal.SIGTERM)
        for connection in waiting:
            receivers.submit(traffic.settle, "SIGTERM: in flight", connection, good)
        receivers.submit(traffic.settle, "SIGTERM: stalled body", stalled, good, others=(408,))
        receivers.submit(_finish, traffic, slow, good, half)
        while traffic.server.alive and (passed := time.monotonic() - start) < EXIT_TIME:
            _come_late(traffic, good, passed)
            time.sleep(0.2)
        passed = time.monotonic() - start
        try:
            traffic.server.process.wait(max(1.0, EXIT_TIME - passed))
        except psutil.TimeoutExpired:
            ledger.find("SIGTERM", f"the process has not ended after {EXIT_TIME:g} s")
            traffic.server.process.kill()  # which ends the receivers too
    return passed


def _finish(traffic: Traffic, slow: Connection, good: Good, sent: int) -> None:
    """The slow client's second half, a second after SIGTERM."""
    time.sleep(1)
    slow.send(good.message.body[sent:])
    traffic.settle("SIGTERM: slow body", slow, good, others=(408,))


def _come_late(traffic: Traffic, good: Good, passed: float) -> None:
    """A request and a look at the health, so many seconds after SIGTERM."""
    for kind, message in (("SIGTERM: came later", good.message), ("SIGTERM: health", HEALTH)):
        traffic.ledger.send(kind)
        try:
            outcome = _late_outcome(traffic, message, passed)
        except (Hang, Wrong) as error:
            traffic.ledger.fail(kind, str(error))
        else:
            traffic.ledger.end(kind, outcome)


def _late_outcome(traffic: Traffic, message: Message, passed: float) -> str:
    try:
        answer = exchange(traffic.address, message.wire(), HEALTH_TIMEOUT, method=message.method)
    except (ConnectionError, NoAnswer):  # it was never taken in: the server had stopped listening
        return "refused"
    if answer.status == 503:
        check_error(answer)
    elif answer.status != 200 or passed > NOTICE:
        raise Wrong(f"status {answer.status} {passed:.1f} s after SIGTERM: {answer.body[:200]!r}")
    return str(answer.status)
