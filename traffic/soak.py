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
from traffic.messages import Connection, Hang, Message, NoResponse, send_request
from traffic.truth import Wrong, check_error

EXIT_TIME = 30.0
"""Seconds from SIGTERM until Kubernetes kills the process."""
GROWTH = 0.2
"""Allowed growth of the maximum resident memory from the first half to the second. Both see many random sizes."""
FEW = 8
"""Number of clients whose throughput is compared with that of a crowd."""
IN_FLIGHT = 32
"""Number of requests in flight at SIGTERM: twice the queue's size."""
NOTICE = 1.0
"""Seconds within which the server notices SIGTERM."""


@dataclass(frozen=True)
class Result:
    seconds: float
    """Seconds of traffic before SIGTERM."""
    throughput: dict[int, float]
    """Correct responses a second, by the number of clients."""
    memory: tuple[int, int]
    """Maximum resident bytes in the first half of the traffic, and in the second."""
    exit_seconds: float
    """Seconds from SIGTERM to the end of the process."""


def throughput(traffic: Traffic, clients: int, seconds: float) -> float:
    """Measure correct responses a second. Each client sends again as soon as it has a response or a refusal."""
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
    """Run few clients, a crowd, mixed traffic for `seconds`, then SIGTERM under load. The ledger has the findings."""
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
    """Record a finding if the memory grew by more than this share."""
    before, after = result.memory
    if after > before * (1 + growth):
        traffic.ledger.find("memory", f"{before / 1e6:.0f} MB grew to {after / 1e6:.0f} MB")


def end(traffic: Traffic) -> float:
    """Send SIGTERM while requests wait and run, one client is slow and one stalls.

    Accepted requests get a response: 503 or 408 if the server cannot finish them. Later requests are refused, and
    `/health`
    stops to succeed.

    Returns:
        Seconds until the process has ended.
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
        # The server has accepted the connections when it responds. It then reads their requests.
        send_request(traffic.address, HEALTH.wire(), TIMEOUT, method="GET")
        time.sleep(0.5)
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
            traffic.server.process.kill()  # this ends the receivers too
    return passed


def _finish(traffic: Traffic, slow: Connection, good: Good, sent: int) -> None:
    """Send the slow client's second half one second after SIGTERM."""
    time.sleep(1)
    slow.send(good.message.body[sent:])
    traffic.settle("SIGTERM: slow body", slow, good, others=(408,))


def _come_late(traffic: Traffic, good: Good, passed: float) -> None:
    """Send a request and a health check, `passed` seconds after SIGTERM."""
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
        response = send_request(traffic.address, message.wire(), HEALTH_TIMEOUT, method=message.method)
    except (ConnectionError, NoResponse):  # the server had stopped listening
        return "refused"
    if response.status == 503:
        check_error(response)
    elif response.status != 200 or passed > NOTICE:
        raise Wrong(f"status {response.status} {passed:.1f} s after SIGTERM: {response.body[:200]!r}")
    return str(response.status)
