"""Tests of a quick fuzz and a short soak of real servers, and of their checks of a service that misbehaves."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from handlers import MODELS
from handlers.serving.media.output import tensor_bytes
from traffic import report, soak
from traffic.clients import CLIENTS, Traffic
from traffic.fuzz import Fuzz, Target, send_case
from traffic.ledger import Ledger
from traffic.memory import Memory
from traffic.messages import Hang, Message, NoResponse, Response, send_request
from traffic.mutations import FILES, MUTATIONS, WIRE_MUTATIONS, Case, make_case
from traffic.samples import Sample, samples
from traffic.servers import ORIGIN, TRACEBACK, server
from traffic.truth import Truth, Wrong, check, check_refusal

COUNT = 300
"""Requests of the quick fuzz, with each kind of mutation. `make fuzz` sends ten thousand."""


@pytest.mark.slow
def test_malformed_requests_over_http(tmp_path: Path) -> None:
    with server("tiny", tmp_path / "tiny") as tiny, server("hunyuan-video", tmp_path / "video") as video:
        fuzz = Fuzz([Target(tiny), Target(video)], seed=1)
        fuzz.warm_up()
        fuzz.run(range(COUNT))
        fuzz.check_memory()
        fuzz.check_logs()
    assert_nothing_broke(fuzz.ledger)
    assert fuzz.ledger.sent.total() == COUNT + COUNT // 20 + sum(len(target.samples) for target in fuzz.targets)
    assert {"200", "400", "404", "405", "413", "closed"} <= set(report.rows(fuzz.ledger)[0])


@pytest.mark.slow
def test_mutated_files_within_a_memory_limit(tmp_path: Path) -> None:
    with (
        server("tiny", tmp_path / "tiny") as tiny,
        server("hunyuan-video", tmp_path / "video", memory=2 * 10**9) as video,
    ):
        fuzz = Fuzz([Target(tiny), Target(video)], seed=1, files=True)
        fuzz.warm_up()
        fuzz.run(range(42))
        lines = fuzz.check_memory()
        fuzz.check_logs()
    assert_nothing_broke(fuzz.ledger)
    assert fuzz.ledger.slowest[0] > 0
    assert [line.partition(":")[0] for line in lines] == ["tiny", "hunyuan-video"]
    assert set(FILES) <= set(fuzz.ledger.sent)
    assert {"200", "400"} <= set(report.rows(fuzz.ledger)[0])


def assert_nothing_broke(ledger: Ledger) -> None:
    assert [finding.describe() for finding in ledger.findings] == []
    assert not ledger.lost


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    with server("tiny,hunyuan-video", tmp_path, VAE_GRACE="2") as running:
        traffic = Traffic(running, seed=1)
        result = soak.run(traffic, seconds=3)
    assert_nothing_broke(traffic.ledger)
    assert result.exit_seconds < soak.EXIT_TIME
    clients = {client.__name__ for client in CLIENTS}
    others = {"streams", "videos", "malformed", "crowd", "health"}
    assert clients == {"keep_alive", "fresh", "sizes", "pipelined", "slow", "leaver", *others}
    goods = {"good: keep-alive", "good: a connection each", "good: random sizes", "good: pipelined"}
    goods.add("good: the video model")
    sent = set(traffic.ledger.sent)
    assert goods | {"burst", "health", "SIGTERM: in flight"} <= sent
    # The kind is random, and a slow computer sends only one stream.
    assert sent & {"stream: read", "stream: read slowly", "stream: left"}
    about = {"device": "a CPU", "date": "today", "commit": "abc", "versions": {"python": "3"}}
    page = report.soak_page(traffic.ledger, result, about, toolkit=False)
    assert "Nothing broke" in page
    assert "| SIGTERM: health |" in page


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth("tiny", Path(MODELS["tiny"].checkpoint))


@pytest.fixture(scope="module")
def png() -> Sample:
    """Return a decode to PNG of 32x48 pixels."""
    return next(sample for sample in samples("tiny", sides=(32,)) if sample.name == "png")


def encode_png(colour: str, size: tuple[int, int] = (48, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "png")
    return buffer.getvalue()


JSON = {"Content-Type": "application/json"}
TENSOR = {"Content-Type": "tensor/binary", "shape": "[1, 3, 32, 48]", "dtype": "float32"}
MISBEHAVIOUR = {
    "a crash": (500, JSON, b'{"error": "it failed"}', "status 500"),
    "a bad gateway": (502, JSON, b'{"error": "it failed"}', "status 502"),
    "a queue that is not full": (503, JSON, b'{"error": "later"}', "status 503"),
    "a redirect": (307, {"Location": "/"}, b"", "status 307"),
    "an empty response": (204, {}, b"", "status 204"),
    "an error in HTML": (400, {"Content-Type": "text/html"}, b"<h1>Bad</h1>", "not JSON"),
    "JSON that says HTML": (400, {"Content-Type": "text/html"}, b'{"error": "bad"}', "not JSON"),
    "an error without a text": (400, JSON, b'{"error": ["bad"]}', "not JSON"),
    "an error of another name": (422, JSON, b'{"detail": "bad"}', "not JSON"),
    "uvicorn's refusal of what is HTTP": (400, {}, b"Invalid HTTP request received.", "refused a request that is HTTP"),
    "a black image": (200, {"Content-Type": "image/png"}, encode_png("black"), "pixels differ"),
    "an image of another size": (200, {"Content-Type": "image/png"}, encode_png("black", (48, 40)), "instead of"),
    "half an image": (200, {"Content-Type": "image/png"}, encode_png("red")[:60], "cannot be read"),
    "another tensor": (200, TENSOR, bytes(4 * 3 * 32 * 48), "values differ"),
    "a tensor of too few bytes": (200, TENSOR, bytes(100), "cannot be read"),
    "a tensor without a shape": (200, {"Content-Type": "tensor/binary"}, bytes(100), "cannot be read"),
    "text": (200, {"Content-Type": "text/plain"}, b"Ok", "plain text for POST"),
    "no media type": (200, {}, b"Ok", "cannot be read"),
}


class Misbehaving(BaseHTTPRequestHandler):
    """A server that responds to a POST as `MISBEHAVIOUR` declares for its header `Act`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        act = self.headers["Act"]
        if act == "hang":
            time.sleep(1)
        elif act in MISBEHAVIOUR:
            status, headers, body, _ = MISBEHAVIOUR[act]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def misbehaving() -> Iterator[tuple[str, int]]:
    """Run the misbehaving server and return its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running.server_address
        running.shutdown()
        thread.join()


def send(address: tuple[str, int], truth: Truth, message: Message, act: str, *, http: bool = True) -> Ledger:
    """Send a request to the misbehaving server. Return the ledger."""
    message = Message(message.method, message.path, message.query, (*message.headers, ("Act", act)), message.body)
    ledger = Ledger()
    case = Case(7, "kind", message.wire(), message, message.method, http=http, ends=False)
    send_case(ledger, address, truth, case, timeout=0.5)
    assert not ledger.lost
    return ledger


@pytest.mark.parametrize("act", MISBEHAVIOUR)
def test_the_checker_notices_each_misbehaviour(
    act: str, misbehaving: tuple[str, int], truth: Truth, png: Sample
) -> None:
    (finding,) = send(misbehaving, truth, png.message, act).findings
    assert MISBEHAVIOUR[act][3] in finding.text
    assert report.summary(send(misbehaving, truth, png.message, act)).startswith("1 broke; the first: kind (request 7)")


def test_the_checker_notices_a_hang_and_a_closed_connection(
    misbehaving: tuple[str, int], truth: Truth, png: Sample
) -> None:
    (finding,) = send(misbehaving, truth, png.message, "hang").findings
    assert finding.text == "no response in time"
    assert send(misbehaving, truth, png.message, "close").findings
    assert not send(misbehaving, truth, png.message, "close", http=False).findings  # correct without HTTP
    with pytest.raises(Hang):
        send_request(misbehaving, Message(headers=(("Act", "hang"),)).wire(), timeout=0.2)
    with pytest.raises(NoResponse):
        send_request(misbehaving, Message(headers=(("Act", "close"),)).wire(), timeout=5)


def test_the_checker_notices_a_refused_connection(truth: Truth, png: Sample) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as gone:
        address = gone.server_address
    assert "refused" in send(address, truth, png.message, "").findings[0].text


def test_the_checker_compares_a_response_with_diffusers(truth: Truth, png: Sample) -> None:
    expected = truth.expected_for_message(png.message)
    assert torch.equal(expected, truth.expected_for_sample(png))
    headers = {"content-type": "tensor/binary", "shape": json.dumps(list(expected.shape)), "dtype": "float32"}
    check(Response(200, headers, tensor_bytes(expected)), png.message, expected)
    with pytest.raises(Wrong, match="values differ"):
        check(Response(200, headers, tensor_bytes(expected + 0.1)), png.message, expected)
    with pytest.raises(Wrong, match="NaN or infinity"):
        check(Response(200, headers, tensor_bytes(expected)), png.message, expected / 0)


def test_a_good_request_must_not_get_an_error() -> None:
    error = Response(400, {"content-type": "application/json"}, b'{"error": "no"}')
    check(error)
    with pytest.raises(Wrong, match="for a good request"):
        check(error, good=True)


@pytest.mark.parametrize(
    ("headers", "is_wrong"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, True),
        ({"Sec-Fetch-Site": "same-site"}, True),
        ({"Origin": "https://b.example"}, True),
        ({"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "same-origin"}, False),
    ],
)
def test_a_page_of_another_origin_must_get_an_error(headers: dict[str, str], is_wrong: bool) -> None:
    message = Message(headers=tuple(headers.items()))
    success = Response(200, {"content-type": "image/png"}, encode_png("red"))
    with pytest.raises(Wrong, match="another origin") if is_wrong else nullcontext():
        check(success, message)


def test_a_refusal_must_have_retry_after() -> None:
    headers = {"content-type": "application/json", "retry-after": "1"}
    check_refusal(Response(503, headers, b'{"error": "later"}'))
    with pytest.raises(Wrong, match="Retry-After"):
        check_refusal(Response(503, {"content-type": "application/json"}, b'{"error": "later"}'))


@pytest.mark.slow
def test_seed_and_number_determine_a_request() -> None:
    good = samples("tiny")
    cases = [make_case(good, 0, number) for number in range(500)]
    assert cases[123] == make_case(samples("tiny"), 0, 123)
    assert cases[123] != make_case(good, 1, 123)
    assert {case.kind for case in cases} == {*MUTATIONS, *WIRE_MUTATIONS, *FILES}


def test_a_request_without_an_outcome_is_lost() -> None:
    ledger = Ledger()
    for _ in range(3):
        ledger.send("good")
    ledger.end("good", "200")
    assert ledger.lost == {"good": 2}
    assert report.summary(ledger) == "requests without an outcome: good 2"
    assert report.rows(ledger) == [["kind", "sent", "200"], ["good", "3", "1"], ["all", "3", "1"]]


def test_memory_returns_the_peaks_of_both_halves() -> None:
    memory = Memory()
    for second in range(100):
        peak = 1000 if second in (25, 95) else 0  # the peak of one request
        memory.add(second, (500 if second < 20 else 100 + second // 2) + peak)
    assert memory.halves() == (1112, 1147)


def test_the_last_error_of_a_chain_of_stack_traces_counts() -> None:
    log = """INFO: x
Traceback (most recent call last):
  File "a"
    ^^^
ValueError: 1

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a"
h11._util.LocalProtocolError: 2
INFO: y
Traceback (most recent call last):
  File "a"
KeyError: 3
"""
    assert TRACEBACK.findall(log) == ["h11._util.LocalProtocolError: 2", "KeyError: 3"]
