"""Clients of a soak: good ones, slow ones, ones that leave, crowds, and malformed requests.

Each function is one turn of one client; a thread takes turns until the run is over.
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
from traffic.messages import Address, Connection, Hang, Message, NoAnswer, exchange
from traffic.mutations import case
from traffic.samples import Sample, any_size, large, samples, stream
from traffic.servers import Server
from traffic.truth import Truth, Wrong, check, check_refusal

TIMEOUT = 60.0
"""Seconds in which every request of a soak is answered, bursts and all."""
HEALTH_TIMEOUT = 5.0
CROWD = 200
"""Connections of a burst."""
BURST_EVERY = 10.0
"""Seconds from one burst to the next."""


@dataclass(frozen=True)
class Good:
    """A good request, and what the VAE in plain diffusers makes of it where that was asked for."""

    message: Message
    expected: Tensor | None = None


@dataclass
class Traffic:
    """What the clients share."""

    server: Server
    """Of a model of pictures, and of the video model as well."""
    seed: int
    video: str = "hunyuan-video"
    """The key of a video model: it streams."""
    ledger: Ledger = field(default_factory=Ledger)
    over: threading.Event = field(default_factory=threading.Event)
    """Set when the clients have to end."""
    numbers: Iterator[int] = field(default_factory=itertools.count)
    """Of the malformed requests."""

    def __post_init__(self) -> None:
        weights = self.server.weights
        self.truth = Truth(self.server.key, weights[self.server.key])
        self.samples: list[Sample] = samples(self.server.key, sides=(32, 64, 128, 192))
        self.goods = [Good(sample.message, self.truth.of_sample(sample)) for sample in self.samples]
        sample = large(self.server.key)
        self.large = Good(sample.message, self.truth.of_sample(sample))
        truth = Truth(self.video, weights[self.video])
        self.stream, *self.videos = [
            Good(replace(sample.message, path=f"/{self.video}{sample.message.path}"), truth.of_sample(sample))
            for sample in (stream(self.video), *samples(self.video))
        ]

    @property
    def address(self) -> Address:
        return self.server.address

    def settle(self, kind: str, connection: Connection, good: Good, others: tuple[int, ...] = ()) -> None:
        """Receives the answer to a good request: a right success, a refusal, or an error with one of the `others`."""
        try:
            answer = connection.receive()
            if answer.status == 503:
                check_refusal(answer)
            else:
                check(answer, good.message, good.expected, good=answer.status not in others)
        except (NoAnswer, Hang, Wrong) as error:
            self.ledger.fail(kind, str(error))
        else:
            self.ledger.end(kind, str(answer.status))

    def send_alone(self, kind: str, good: Good) -> None:
        """A good request on a connection of its own, and its answer."""
        self.ledger.send(kind)
        with Connection(self.address, TIMEOUT) as connection:
            connection.send(good.message.wire())
            self.settle(kind, connection, good)

    def keep(self, client: Callable[[Traffic, Random], None]) -> None:
        """Lets a client take turns until the run is over."""
        rng = Random(f"{self.seed}-{client.__name__}-{threading.get_ident()}")
        try:
            while not self.over.is_set():
                client(self, rng)
        except Exception as error:  # else the thread would end without a word
            self.ledger.find(client.__name__, f"{type(error).__name__}: {error}")


def keep_alive(traffic: Traffic, rng: Random) -> None:
    """Ten good requests on one connection."""
    with Connection(traffic.address, TIMEOUT) as connection:
        for _ in range(10):
            good = rng.choice(traffic.goods)
            traffic.ledger.send("good: keep-alive")
            connection.send(good.message.wire(close=False))
            traffic.settle("good: keep-alive", connection, good)
            traffic.over.wait(rng.random() * 0.1)


def fresh(traffic: Traffic, rng: Random) -> None:
    """A good request on a connection of its own."""
    traffic.send_alone("good: a connection each", rng.choice(traffic.goods))
    traffic.over.wait(rng.random() * 0.1)


def sizes(traffic: Traffic, rng: Random) -> None:
    """A size that the server has not seen yet: its memory is that of the largest, not of all of them."""
    traffic.send_alone("good: random sizes", Good(any_size(traffic.server.key, rng)))
    traffic.over.wait(rng.random() * 0.1)


def pipelined(traffic: Traffic, rng: Random) -> None:
    """Three requests at once on a connection; the answers come in their order."""
    goods = rng.choices(traffic.goods, k=3)
    with Connection(traffic.address, TIMEOUT) as connection:
        for _ in goods:
            traffic.ledger.send("good: pipelined")
        connection.send(b"".join(good.message.wire(close=False) for good in goods))
        for good in goods:
            traffic.settle("good: pipelined", connection, good)
    traffic.over.wait(rng.random() * 0.3)


def slow(traffic: Traffic, rng: Random) -> None:
    """Sends its head or its body, or reads its answer, in small parts over some seconds."""
    part = rng.choice(("head", "body", "answer"))
    kind, good = f"slow: {part}", traffic.large if part == "answer" else rng.choice(traffic.goods)
    head, body = good.message.head(), good.message.body
    traffic.ledger.send(kind)
    with Connection(traffic.address, TIMEOUT) as connection:
        for piece in pieces(head, 20 if part == "head" else 1):
            connection.send(piece)
            traffic.over.wait(0.1)
        for piece in pieces(body, 20 if part == "body" else 1):
            connection.send(piece)
            traffic.over.wait(0.1)
        if part == "answer":  # of 3 MB, which the kernel's buffers do not hold
            traffic.over.wait(3)
        traffic.settle(kind, connection, good)


def leaver(traffic: Traffic, rng: Random) -> None:
    """Disconnects in the middle of its head or body, in the queue, on the device, or in the middle of the answer."""
    stage = rng.choice(("in the head", "in the body", "in the queue", "on the device", "in the answer"))
    kind, message = f"left: {stage}", rng.choice(traffic.goods).message
    if stage in ("on the device", "in the answer"):
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
        elif stage == "in the answer":
            connection.socket.recv(1000)
        if rng.random() < 0.5:  # a reset instead of an end
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    traffic.ledger.end(kind, "abandoned")
    traffic.over.wait(rng.random() * 0.2)


def streams(traffic: Traffic, rng: Random) -> None:
    """Watches a video as it is decoded: to its end, in small parts, or until it has seen enough."""
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
    """A good request to the other model of the service."""
    traffic.send_alone("good: the video model", rng.choice(traffic.videos))
    traffic.over.wait(rng.random() * 0.3)


def malformed(traffic: Traffic, rng: Random) -> None:
    """The fuzz generator's next request."""
    made = case(traffic.samples, traffic.seed, next(traffic.numbers))
    send_case(traffic.ledger, traffic.address, traffic.truth, made, TIMEOUT, busy=True)
    traffic.over.wait(rng.random() * 0.1)


def crowd(traffic: Traffic, rng: Random) -> None:
    """Good requests on `CROWD` connections at once."""
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
    """Asks for `/health`, which is `Ok` all the time."""
    traffic.ledger.send("health")
    try:
        answer = exchange(traffic.address, HEALTH.wire(), HEALTH_TIMEOUT, method="GET")
        if (answer.status, answer.body) != (200, b"Ok"):
            raise Wrong(f"status {answer.status} while it served: {answer.body[:200]!r}")
    except (NoAnswer, Hang, Wrong) as error:
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
"""One thread each."""


def pieces(data: bytes, count: int) -> list[bytes]:
    """The data in so many parts, or a few less."""
    size = -(-len(data) // count)
    return [data[start : start + size] for start in range(0, len(data), size)]
