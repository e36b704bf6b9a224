"""Clients of a soak: good, slow, disconnecting and malformed ones, and crowds.

Each function is one turn of one client. A thread repeats turns until the run is over.
"""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from random import Random

from torch import Tensor

from traffic.fuzz import send_case
from traffic.ledger import Ledger
from traffic.messages import Address, Connection, Hang, Message, NoResponse, send_request
from traffic.mutations import make_case
from traffic.samples import Sample, any_size, large, samples, stream
from traffic.servers import Server
from traffic.truth import Truth, Wrong, check, check_refusal

TIMEOUT = 60.0
"""Seconds within which the server responds to every request of a soak, bursts included."""
HEALTH_TIMEOUT = 5.0
CROWD = 200
"""Connections of a burst."""
BURST_EVERY = 10.0
"""Seconds from one burst to the next."""


@dataclass(frozen=True)
class Good:
    """A good request, with the output of the VAE in plain diffusers if the test compares it."""

    message: Message
    expected: Tensor | None = None


@dataclass
class Traffic:
    """State that all clients share."""

    server: Server
    """The server of an image model and of the video model."""
    seed: int
    video: str = "hunyuan-video"
    """Key of a video model that streams."""
    ledger: Ledger = field(default_factory=Ledger)
    over: threading.Event = field(default_factory=threading.Event)
    """Event that ends all clients."""
    numbers: Iterator[int] = field(default_factory=itertools.count)
    """Numbers of the malformed requests."""

    def __post_init__(self) -> None:
        weights = self.server.weights
        self.truth = Truth(self.server.key, weights[self.server.key])
        self.samples: list[Sample] = samples(self.server.key, sides=(32, 64, 128, 192))
        self.goods = [Good(sample.message, self.truth.expected_for_sample(sample)) for sample in self.samples]
        sample = large(self.server.key)
        self.large = Good(sample.message, self.truth.expected_for_sample(sample))
        truth = Truth(self.video, weights[self.video])
        self.stream, *self.videos = [
            Good(replace(sample.message, path=f"/{self.video}{sample.message.path}"), truth.expected_for_sample(sample))
            for sample in (stream(self.video), *samples(self.video))
        ]

    @property
    def address(self) -> Address:
        return self.server.address

    def settle(self, kind: str, connection: Connection, good: Good, others: tuple[int, ...] = ()) -> None:
        """Receive the response to a good request.

        It must be a correct success, a refusal, or one of the error statuses in `others`.
        """
        try:
            response = connection.receive()
            if response.status == 503:
                check_refusal(response)
            else:
                check(response, good.message, good.expected, good=response.status not in others)
        except (NoResponse, Hang, Wrong) as error:
            self.ledger.fail(kind, str(error))
        else:
            self.ledger.end(kind, str(response.status))

    def send_alone(self, kind: str, good: Good) -> None:
        """Send a good request on its own connection and check the response."""
        self.ledger.send(kind)
        with Connection(self.address, TIMEOUT) as connection:
            connection.send(good.message.wire())
            self.settle(kind, connection, good)

    def keep(self, client: Callable[[Traffic, Random], None]) -> None:
        """Repeat turns of a client until the run is over."""
        rng = Random(f"{self.seed}-{client.__name__}-{threading.get_ident()}")
        try:
            while not self.over.is_set():
                client(self, rng)
        except Exception as error:  # an exception would end the thread silently
            self.ledger.find(client.__name__, f"{type(error).__name__}: {error}")


def keep_alive(traffic: Traffic, rng: Random) -> None:
    """Send ten good requests on one connection."""
    with Connection(traffic.address, TIMEOUT) as connection:
        for _ in range(10):
            good = rng.choice(traffic.goods)
            traffic.ledger.send("good: keep-alive")
            connection.send(good.message.wire(close=False))
            traffic.settle("good: keep-alive", connection, good)
            traffic.over.wait(rng.random() * 0.1)


def fresh(traffic: Traffic, rng: Random) -> None:
    """Send a good request on its own connection."""
    traffic.send_alone("good: a connection each", rng.choice(traffic.goods))
    traffic.over.wait(rng.random() * 0.1)


def sizes(traffic: Traffic, rng: Random) -> None:
    """Send a request of a random size.

    The server's memory depends on the largest size, not on the number of sizes.
    """
    traffic.send_alone("good: random sizes", Good(any_size(traffic.server.key, rng)))
    traffic.over.wait(rng.random() * 0.1)


def pipelined(traffic: Traffic, rng: Random) -> None:
    """Send three requests at once on a connection. The responses arrive in the same order."""
    goods = rng.choices(traffic.goods, k=3)
    with Connection(traffic.address, TIMEOUT) as connection:
        for _ in goods:
            traffic.ledger.send("good: pipelined")
        connection.send(b"".join(good.message.wire(close=False) for good in goods))
        for good in goods:
            traffic.settle("good: pipelined", connection, good)
    traffic.over.wait(rng.random() * 0.3)


def slow(traffic: Traffic, rng: Random) -> None:
    """Send the head or the body, or read the response, in small pieces over some seconds."""
    stage = rng.choice(("head", "body", "response"))
    kind, good = f"slow: {stage}", traffic.large if stage == "response" else rng.choice(traffic.goods)
    head, body = good.message.head(), good.message.body
    traffic.ledger.send(kind)
    with Connection(traffic.address, TIMEOUT) as connection:
        for piece in pieces(head, 20 if stage == "head" else 1):
            connection.send(piece)
            traffic.over.wait(0.1)
        for piece in pieces(body, 20 if stage == "body" else 1):
            connection.send(piece)
            traffic.over.wait(0.1)
        if stage == "response":  # 3 MB of response, more than the kernel's buffers take
            traffic.over.wait(3)
        traffic.settle(kind, connection, good)


def leaver(traffic: Traffic, rng: Random) -> None:
    """Disconnect during the head, the body, the queue, the work on the device, or the response."""
    stage = rng.choice(("in the head", "in the body", "in the queue", "on the device", "in the response"))
    kind, message = f"left: {stage}", rng.choice(traffic.goods).message
    if stage in ("on the device", "in the response"):
        message = traffic.large.message
    head, body = message.head(), message.body
    traffic.ledger.send(kind)
    with Connection(traffic.address, TIMEOUT) as connection:
        if stage == "in the head":
            connection.send(head[: rng.randrange(1, len(head))])
        elif stage == "in the body":
            connection.send(head + body[: len(body) // 2])
        else:
            connection.send(head + body)
        if stage == "on the device":
            time.sleep(0.1)
        elif stage == "in the response":
            connection.socket.recv(1000)
        if rng.random() < 0.5:  # reset the connection
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    traffic.ledger.end(kind, "abandoned")
    traffic.over.wait(rng.random() * 0.2)


def streams(traffic: Traffic, rng: Random) -> None:
    """Read a streamed video to its end, slowly, or only its start."""
    kind = rng.choice(("read", "read slowly", "left"))
    name = f"stream: {kind}"
    traffic.ledger.send(name)
    with Connection(traffic.address, TIMEOUT) as connection:
        connection.send(traffic.stream.message.wire())
        if kind == "left":
            connection.socket.recv(rng.choice((20, 1000, 5000)))
            traffic.ledger.end(name, "abandoned")
        else:
            traffic.over.wait(2 if kind == "read slowly" else 0)
            traffic.settle(name, connection, traffic.stream)
    traffic.over.wait(rng.random() * 0.3)


def videos(traffic: Traffic, rng: Random) -> None:
    """Send a good request to the video model of the service."""
    traffic.send_alone("good: the video model", rng.choice(traffic.videos))
    traffic.over.wait(rng.random() * 0.3)


def malformed(traffic: Traffic, rng: Random) -> None:
    """Send the next request of the fuzz generator."""
    case = make_case(traffic.samples, traffic.seed, next(traffic.numbers))
    send_case(traffic.ledger, traffic.address, traffic.truth, case, TIMEOUT, busy=True)
    traffic.over.wait(rng.random() * 0.1)


def crowd(traffic: Traffic, rng: Random) -> None:
    """Send good requests on `CROWD` connections at once."""
    goods = rng.choices(traffic.goods, k=CROWD)
    with ExitStack() as stack:
        connections = []
        for good in goods:
            traffic.ledger.send("burst")
            connections.append(stack.enter_context(Connection(traffic.address, TIMEOUT)))
            connections[-1].send(good.message.wire())
        for connection, good in zip(connections, goods, strict=True):
            traffic.settle("burst", connection, good)
    traffic.over.wait(BURST_EVERY)


def health(traffic: Traffic, rng: Random) -> None:
    """Request `/health`, which always returns `Ok`."""
    traffic.ledger.send("health")
    try:
        response = send_request(traffic.address, HEALTH.wire(), HEALTH_TIMEOUT, method="GET")
        if (response.status, response.body) != (200, b"Ok"):
            raise Wrong(f"status {response.status} while it served: {response.body[:200]!r}")
    except (NoResponse, Hang, Wrong) as error:
        traffic.ledger.fail("health", str(error))
    else:
        traffic.ledger.end("health", "200")
    traffic.over.wait(0.2)


HEALTH = Message("GET", "/health")
CLIENTS = (
    keep_alive,
    keep_alive,
    fresh,
    sizes,
    pipelined,
    slow,
    slow,
    leaver,
    streams,
    videos,
    malformed,
    crowd,
    health,
)
"""Clients of a run. Each has its own thread."""


def pieces(data: bytes, count: int) -> list[bytes]:
    """Split the data into at most `count` pieces of equal size."""
    size = -(-len(data) // count)
    return [data[start : start + size] for start in range(0, len(data), size)]
