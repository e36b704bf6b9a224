"""Malformed and mutated requests. A seed and a number determine each request, so that it can be sent again."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from traffic.images import IMAGES
from traffic.messages import Message
from traffic.samples import Sample
from traffic.videos import VIDEOS

TEXTS = (
    "", "0", "1", "-1", "-0", "+8", " 8", "8 ", "08", "0x10", "1_000", "1.0", "1.5", "1e3", "1e-400", "1e309",
    "NaN", "nan", "inf", "-Infinity", "True", "null", "None", "undefined", "[8]", "8,8", "{}", '"8"', "8;drop",
    "2147483648", "4294967296", "9223372036854775808", "18446744073709551617", "-9223372036854775809",
    "9" * 400, "9" * 5000, "-" + "9" * 4301, "1" + "0" * 308, "a" * 20_000,
    "٣", "\uff18", "½", "💥", "\u202e8", "\0", "8\0", "8\r\nX-Injected: 1", "%", "%zz", "../../etc/passwd", "{{7*7}}",
    "float64", "int8", "complex64", "FLOAT32", "object", "mp4", "gif", "jpeg", "PIL", "sample", "tensor",
    "4096", "65536", "1000000",
)  # fmt: skip
"""Values of a parameter."""

JSON_VALUES = (
    None, True, 0, -1, 1.5, 10**400, float("inf"), float("nan"), "", "8", "\ud800", "\0", "💥", [], [[]], {},
    [None], [8], ["8", 8], {"a": []}, 1e308, 2**63, "9" * 5000, [8] * 10_000, {"shape": [8]}, "a" * 20_000,
)  # fmt: skip
"""Values inside JSON. The infinities are spelled as in Python's `json`."""

PARAMETERS = (
    "shape", "dtype", "scaling_factor", "shift_factor", "do_scaling", "output_type", "partial_postprocess",
    "image_format", "quality", "fps", "height", "width", "sample_mode", "seed",
    "stream",
)  # fmt: skip
PATHS = (
    "/", "/predict", "/decode", "/encode", "/health", "/metrics", "/nowhere", "/decode/", "//", "//decode", "/./",
    "/../handler.py", "/%2e%2e/%2e%2e/etc/passwd", "/%00", "/%ff%fe", "/decode%20", "/DECODE", "/decode;a=b", "*",
    "/" + "a" * 5000, "/" + "a/" * 2000, "http://elsewhere/decode", "localhost:80", "/%F0%9F%92%A5", "/docs",
    "/openapi.json", "/invocations", "/.git/config", "/[", "/{path}", "/decode#fragment", "/http://[", "//[",
)  # fmt: skip
METHODS = (
    "GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "post", "PoSt", "BREW", "X" * 2000, "!",
    "PROPFIND", "QUERY",
)  # fmt: skip
MEDIA_TYPES = (
    "tensor/binary", "tensor/base64", "application/json", "application/octet-stream", "text/plain", "text/html", "",
    "image/png", "image/jpeg", "image/webp", "image/gif", "image/*", "video/mp4", "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x", "multipart/form-data", "application/json; charset=utf-16", ";", "/", "*/*",
    "application/xml", "audio/wav", "TENSOR/BINARY", "a" * 5000, "image/png, image/jpeg", "ü/é", '"', "=;=;=;",
    "image/png;q=nan", "tensor/binary;q=0", "application/json;q=-1", "image/jpeg;q=0, image/png", "image/*;q=0",
    "image/webp;q=0.5, image/png;q=0.9",
)  # fmt: skip
HOSTS = ("", "[", "[::1", "]", "[::1]:x", "a b", "host:port", "evil@host:99999", "/?#", "%zz", "ü", "x" * 5000)
HEADERS = (
    ("Accept-Encoding", "br;q=9"), ("Expect", "100-continue"), ("Expect", "200-ok"), ("Range", "bytes=0-0"),
    ("Upgrade", "websocket"), ("Upgrade", "h2c"), ("Connection", "upgrade"), ("Cookie", "a" * 9000), ("Te", "trailers"),
    ("Authorization", "Bearer"), ("Authorization", "Basic ü"), ("X-Request-Id", "a" * 9000), ("X-Request-Id", '{"a"}'),
    ("X-Request-Id", "ü\u202e💥"), ("X-Forwarded-For", "::::"), ("X-Forwarded-Proto", "gopher"), ("X-Empty", ""),
    ("Content-Encoding", "gzip"), ("Content-Encoding", "x" * 500), ("If-Match", "*"), ("Origin", "null"),
    ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Site", "same-site"), ("Sec-Fetch-Site", "none"),
    ("Sec-Fetch-Site", "a" * 5000), ("Origin", "https://b.example"),
    ("shape", "[1]"), ("dtype", "float32"), ("X-Scale-Up-Timeout", "-1"), ("Forwarded", 'for="'), ("Trailer", "X"),
    ("Keep-Alive", "timeout=-1"), ("Content-Length-X", "9"), ("!#$%&'", "1"),
)  # fmt: skip


HEAD_LIMIT = 65_536
"""Length of a request's head in bytes from which uvicorn may refuse it in plain text."""


@dataclass(frozen=True)
class Case:
    """A request to send."""

    number: int
    kind: str
    wire: bytes
    message: Message | None
    """Content of the request; None if its bytes were changed after it was written."""
    method: str
    http: bool
    """True for HTTP, to which the service itself must respond."""
    ends: bool
    """True if it is shorter than its length says, so that the client must end the sending side."""
    is_file: bool = False
    """True for a good request to encode a file, of which only the file is mutated."""


def make_case(samples: Sequence[Sample], seed: int, number: int, kinds: Sequence[str] | None = None) -> Case:
    """Return the request with this number: a good one with one or two mutations, or a mutated file.

    Args:
        kinds: names in `MUTATIONS`, `WIRE_MUTATIONS` and `FILES` to choose from; None for all of them.
    """
    rng = Random(f"{seed}-{number}")
    message = rng.choice(samples).message
    kind = rng.choice(kinds or [*MUTATIONS, *WIRE_MUTATIONS, *FILES])
    if kind in FILES:
        message = Message(path="/encode", body=FILES[kind](rng))
        return Case(number, kind, message.wire(), message, message.method, http=True, ends=False, is_file=True)
    if rng.random() < 0.5:
        message = rng.choice(list(MUTATIONS.values()))(rng, message)
    if kind in MUTATIONS:
        message = MUTATIONS[kind](rng, message)
        http = len(message.head()) < HEAD_LIMIT
        return Case(number, kind, message.wire(), message, message.method, http, ends=False)
    wire, http, ends = WIRE_MUTATIONS[kind](rng, message)
    return Case(number, kind, wire, None, message.method, http and len(message.head()) < HEAD_LIMIT - 5000, ends)


# Each function returns a mutated message that is still HTTP.


def missing(rng: Random, message: Message) -> Message:
    names = sorted({name for name, _ in message.query})
    gone = rng.choice(names) if names else None
    if rng.random() < 0.3:  # drop a dimension of the shape
        query = list(message.query)
        if query:
            query.pop(rng.randrange(len(query)))
        return replace(message, query=tuple(query))
    return replace(message, query=tuple(pair for pair in message.query if pair[0] != gone))


def repeated(rng: Random, message: Message) -> Message:
    query = list(message.query) or [("shape", "8")]
    query += [rng.choice(query)] * rng.choice((1, 1, 2, 100))
    rng.shuffle(query)
    return replace(message, query=tuple(query))


def value(rng: Random, message: Message) -> Message:
    query = list(message.query)
    if query and rng.random() < 0.7:
        position = rng.randrange(len(query))
        query[position] = (query[position][0], rng.choice(TEXTS))
    else:
        query.append((rng.choice(PARAMETERS), rng.choice(TEXTS)))
    return replace(message, query=tuple(query))


def dimensions(rng: Random, message: Message) -> Message:
    """Send another shape: permuted, negative, overflowing or with many dimensions, often for as many bytes."""
    shape = [int(size) for name, size in message.query if name == "shape" and size.isdecimal() and len(size) < 20]
    shape = shape or [1, 8, 8, 16]
    change = rng.randrange(8)
    if change == 0:
        rng.shuffle(shape)
    elif change == 1:
        shape = [-size for size in shape]
    elif change == 2:
        shape.insert(rng.randrange(len(shape) + 1), 1)
    elif change == 3:
        shape = [1] * rng.choice((64, 65, 500)) + shape
    elif change == 4:
        shape = [2**32, 2**32, *shape]
    elif change == 5:
        shape[rng.randrange(len(shape))] *= 2
    elif change == 6:
        shape = [*shape[:-1], 0]
    else:
        shape[rng.randrange(len(shape))] = rng.choice((3, 4, 5, 7, 16, 2**31, 2**63 - 1))
    others = [pair for pair in message.query if pair[0] != "shape"]
    return replace(message, query=(*(("shape", str(size)) for size in shape), *others))


def unknown(rng: Random, message: Message) -> Message:
    names = ("", "model", "__class__", "shape[]", "inputs", "a" * 99, "💥", "constructor", "\0", "SHAPE", "d type")
    count = rng.choice((1, 1, 3, 500))
    more = [(rng.choice(names), rng.choice(TEXTS)[: 20_000 // count]) for _ in range(count)]
    return replace(message, query=(*message.query, *more))


def content_type(rng: Random, message: Message) -> Message:
    return _with_header(message, "Content-Type", rng.choice(MEDIA_TYPES))


def accept(rng: Random, message: Message) -> Message:
    return _with_header(message, "Accept", rng.choice(MEDIA_TYPES))


def host(rng: Random, message: Message) -> Message:
    return _with_header(message, "Host", rng.choice(HOSTS))


def header(rng: Random, message: Message) -> Message:
    if rng.random() < 0.1:
        many = tuple((f"X-{number}", "a" * rng.randrange(100)) for number in range(300))
        return replace(message, headers=message.headers + many)
    return _with_header(message, *rng.choice(HEADERS))


def preflight(rng: Random, message: Message) -> Message:
    """Send a browser's preflight request, or half of it."""
    origins = ("https://a.example", "https://b.example", "null", "", "*", "https://a.example.evil", "ü", "a" * 5000)
    headers = (
        ("Origin", rng.choice(origins)),
        ("Access-Control-Request-Method", rng.choice(("POST", "GET", "DELETE", "", "ü", "POST, PUT"))),
        ("Access-Control-Request-Headers", rng.choice(("authorization", "*", "", "a," * 3000, "X-\u202e"))),
    )
    sent = tuple(rng.sample(headers, rng.choice((1, 2, 3, 3))))
    method = rng.choice(("OPTIONS", "OPTIONS", message.method))
    return replace(message, method=method, headers=(*message.headers, *sent))


def browse(rng: Random, message: Message) -> Message:
    """Request a page as a browser does."""
    accepted = "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"
    method, path = (
        rng.choice(("GET", "GET", "HEAD", "POST")),
        rng.choice(("/", "/", "/config", "/decode", message.path)),
    )
    return replace(_with_header(message, "Accept", accepted), method=method, path=path)


def path(rng: Random, message: Message) -> Message:
    return replace(message, path=rng.choice(PATHS))


def method(rng: Random, message: Message) -> Message:
    return replace(message, method=rng.choice(METHODS))


def truncated(rng: Random, message: Message) -> Message:
    return replace(message, body=message.body[: rng.randrange(len(message.body) or 1)])


def flipped(rng: Random, message: Message) -> Message:
    """Flip some bits, often in the first bytes, which identify a file."""
    body = bytearray(message.body or b"\0")
    end = len(body) if rng.random() < 0.5 else min(len(body), 200)
    for _ in range(rng.choice((1, 1, 2, 8, 100))):
        body[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return replace(message, body=bytes(body))


def extended(rng: Random, message: Message) -> Message:
    more = (b"\0", rng.randbytes(rng.choice((1, 3, 1000))), message.body, b"\0" * 100_000)
    position = rng.choice((0, len(message.body), rng.randrange(len(message.body) + 1)))
    return replace(message, body=message.body[:position] + rng.choice(more) + message.body[position:])


def empty(rng: Random, message: Message) -> Message:
    return replace(message, body=rng.choice((b"", b"", b" ", b"\0", b"\n", b"null")))


def oversized(rng: Random, message: Message) -> Message:
    """Exceed the size limit of a body."""
    return replace(message, body=message.body + bytes(rng.choice((4_000_001, 5_000_000))))


def foreign(rng: Random, message: Message) -> Message:
    """Send a body of another format, or its first bytes."""
    starts = (
        b"GIF89a", b"BM", b"%PDF-1.7", b"PK\3\4", b"\x1f\x8b", b"II*\0", b"<svg>", b"\x93NUMPY", b"\x80\4\x95", b"{",
        b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\xff\xff\xff\xffWEBP", b"\0\0\0\x18ftypavif",
        b"\0\0\0\x18ftypisom", b"\0\0\0\x18ftypqt  ", b"\x1aE\xdf\xa3", b"OggS", b"%!PS-Adobe-3.0", b"\0\0\0\x0cJXL ",
    )  # fmt: skip
    return replace(message, body=rng.choice(starts) + rng.randbytes(rng.choice((0, 10, 2000))))


def numbers(rng: Random, message: Message) -> Message:
    """Make the body's floats NaN, infinite or huge."""
    body = bytearray(message.body)
    special = rng.choice((b"\xff\xff\xff\xff", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\1\0\0\0"))
    for _ in range(rng.choice((1, 5, len(body) // 4))):
        start = rng.randrange(len(body) // 4 or 1) * 4
        body[start : start + 4] = special[: len(body) - start]
    return replace(message, body=bytes(body))


def png_header(rng: Random, message: Message) -> Message:
    """Send a PNG with a valid checksum and a header that does not match its data, or a decompression bomb."""
    sides = (0, 1, 7, 8, 9, 2**31 - 1, 2**31, 65_536, 30_000, 13_000, 1)
    width, height = rng.choice(sides), rng.choice(sides)
    depth, colour = rng.choice((0, 1, 2, 4, 8, 16, 32)), rng.choice((0, 2, 3, 4, 6, 7))
    if rng.random() < 0.1:  # some kilobytes for 16 megapixels
        width, height, depth, colour, data = 4000, 4000, 8, 0, bytes(4001 * 4000)
    else:
        data = rng.randbytes(rng.choice((0, 100, 5000)))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, rng.choice((0, 0, 1, 2))))]
    if rng.random() < 0.3:
        text = zlib.compress(bytes(rng.choice((10, 2_000_000))))
        chunks.append(rng.choice(((b"zTXt", b"a\0\0" + text), (b"iCCP", b"a\0\0" + text), (b"tEXt", b"\xff"))))
    if rng.random() < 0.3:
        chunks.append((rng.choice((b"PLTE", b"tRNS", b"acTL", b"fcTL", b"eXIf", b"pHYs", b"gAMA")), rng.randbytes(7)))
    chunks += [(b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*chunk) for chunk in chunks)
    return replace(message, path="/encode", query=(), headers=(), body=png)


def json_text(rng: Random, message: Message) -> Message:
    """Send a JSON body that is broken, deep, or no object."""
    depth = rng.choice((10, 500, 900, 990, 5000, 100_000))
    text = base64.b64encode(message.body[:3000]).decode()
    bodies = (
        "[" * depth, "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "null", "[]", "0", '""', "{}",
        '{"inputs": ' + "[" * depth + "]" * depth + "}", '{"inputs": "AAAA", "inputs": 1}', '{"inputs": "AAAA"', "{'",
        '{"inputs": "AAAA", "parameters": ' + '{"shape":' + "[" * depth + "]" * depth + "}}", '{"inputs": "A"}',
        '{"inputs": "ü"}', '{"inputs": "\\ud800"}', '{"inputs": "' + text + '\\n"}', '{"\\ud800": 1, "inputs": ""}',
        '\ufeff{"inputs": ""}', '{"inputs": "' + text[:-1] + '"}', "NaN", '{"inputs": NaN}', "1" * 5000,
        '{"inputs": ' + "9" * 5000 + "}", '{"inputs": "AAAA", "parameters": ' + "9" * 5000 + "}", text, "\0" * 100,
    )  # fmt: skip
    body = rng.choice(bodies).encode()
    if rng.random() < 0.1:
        body = body.decode().encode("utf-16")
    return replace(message, headers=_json_type(rng), body=body)


def json_parameters(rng: Random, message: Message) -> Message:
    """Send a valid JSON body with bad parameters."""
    latents = base64.b64encode(bytes(4 * 16 * 64)).decode()
    parameters: dict[str, Any] = {"shape": [1, 8, 8, 16], "dtype": "float32"}
    if rng.random() < 0.5:
        parameters["shape"] = rng.choice(([1, 4, 16, 16], [8, 8, 16], [1, 16, 64], [1024], [1, 16, 64.0], "1"))
    for name in rng.choice((rng.sample(PARAMETERS, rng.choice((1, 2, 5))), ["height", "width"])):
        parameters[name] = rng.choice(JSON_VALUES)
    content: dict[str, Any] = {"inputs": latents, "parameters": parameters}
    if rng.random() < 0.2:
        content[rng.choice(("inputs", "parameters"))] = rng.choice(JSON_VALUES)
    return replace(message, headers=_json_type(rng), query=(), body=json.dumps(content).encode())


MUTATIONS: dict[str, Callable[[Random, Message], Message]] = {
    "query: a parameter missing": missing,
    "query: one repeated": repeated,
    "query: a bad value": value,
    "query: another shape": dimensions,
    "query: unknown names": unknown,
    "header: Content-Type": content_type,
    "header: Accept": accept,
    "header: Host": host,
    "header: others": header,
    "header: a preflight's": preflight,
    "header: a browser's": browse,
    "path": path,
    "method": method,
    "body: truncated": truncated,
    "body: bits flipped": flipped,
    "body: extended": extended,
    "body: empty": empty,
    "body: over the limit": oversized,
    "body: another format": foreign,
    "body: NaN, infinity, huge": numbers,
    "body: a PNG's header": png_header,
    "body: JSON text": json_text,
    "body: JSON parameters": json_parameters,
}


# Each function returns bytes, whether they are HTTP, and whether they are shorter than their length says.
Wire = tuple[bytes, bool, bool]


def raw_query(rng: Random, message: Message) -> Wire:
    """Send percent signs, separators and bytes that no client encodes like this."""
    chunks = (
        "%",
        "%zz",
        "%ff%fe",
        "%00",
        "&&&",
        "===",
        "shape",
        "shape=",
        "=8",
        ";",
        "+",
        "?",
        "/",
        "#",
        "%2",
        "dtype",
    )
    query = "&".join(rng.choice(chunks) + rng.choice(chunks) for _ in range(rng.choice((1, 5, 300))))
    start, _, others = message.wire().partition(b" HTTP/1.1\r\n")
    target = b"&" if b"?" in start else b"?"
    return start + target + query.encode() + b" HTTP/1.1\r\n" + others, True, False


def chunked(rng: Random, message: Message) -> Wire:
    """Send a correct chunked body without a length."""
    head = _chunked_head(message)
    size = rng.choice((1, 7, 1000, 100_000)) if len(message.body) < 10_000 else 10_000
    chunks = (message.body[start : start + size] for start in range(0, len(message.body), size))
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n", True, False


def bad_chunks(rng: Random, message: Message) -> Wire:
    endings = (b"zz\r\nabc\r\n", b"-1\r\n", b"fffffffffffffffffffff\r\n", b"5\r\nabc", b"3\r\nabcdef\r\n0\r\n\r\n", b"")
    body = b"5\r\nhello\r\n" * rng.choice((0, 1, 5)) + rng.choice(endings)
    return _chunked_head(message) + body, False, True


def long_length(rng: Random, message: Message) -> Wire:
    """Send a Content-Length larger than the body."""
    more = rng.choice((1, 1000, 10**9, 10**15))
    return _with_length(message, str(len(message.body) + more)), False, True


def short_length(rng: Random, message: Message) -> Wire:
    """Send a Content-Length smaller than the body. The remaining bytes are no request."""
    return _with_length(message, str(rng.randrange(len(message.body) or 1))), False, False


def bad_length(rng: Random, message: Message) -> Wire:
    length = rng.choice(("-1", "abc", "1e3", "0x10", "٣", "1, 2", "9" * 30, "1.0", "++1", "1\r\nContent-Length: 2"))
    return _with_length(message, length), False, True


def no_length(rng: Random, message: Message) -> Wire:
    """Send a body without a length or chunks: a request without a body, and bytes after it that are no request."""
    return b"\r\n".join(_lines(message, without=b"content-length")) + b"\r\n\r\n" + message.body, False, False


def cut_head(rng: Random, message: Message) -> Wire:
    head = message.head()
    return head[: rng.randrange(1, len(head) - 2)], False, True


def bad_head(rng: Random, message: Message) -> Wire:
    """Send lines that are not HTTP."""
    lines = _lines(message)
    bad = (
        b"no colon", b": no name", b"bad name : 1", b"X: \0", b"X: \x01", b"\xff\xfe: 1", b"X" * 100_000, b" folded",
        b"X: " + b"a" * 100_000, b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked, chunked", b"Host: twice",
    )  # fmt: skip
    lines.insert(rng.randrange(1, len(lines) + 1), rng.choice(bad))
    return b"\r\n".join(lines) + b"\r\n\r\n" + message.body, False, True


def bad_start(rng: Random, message: Message) -> Wire:
    starts = (
        b"POST", b"POST /", b"POST / HTTP/9.9", b"POST / HTTP/1.1 more", b"POST  / HTTP/1.1", b"/ POST HTTP/1.1",
        b"POST / http/1.1", b"POST /\xff HTTP/1.1", b"POST / \0 HTTP/1.1", b"P\0ST / HTTP/1.1", b"POST / HTTP/1.0",
        b"GET / HTTP/0.9", b"POST /" + b"a" * 100_000 + b" HTTP/1.1", b"", b" ", b"PRI * HTTP/2.0", b"POST / FTP/1.1",
    )  # fmt: skip
    lines = _lines(message)
    lines[0] = rng.choice(starts)
    return rng.choice((b"\r\n", b"\n", b"\r")).join(lines) + b"\r\n\r\n" + message.body, False, True


def garbage(rng: Random, message: Message) -> Wire:
    """Send other protocols, or random bytes."""
    kinds = (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(50),
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"\x05\x01\x00",  # SOCKS
        b"*1\r\n$4\r\nPING\r\n",
        rng.randbytes(rng.choice((1, 100, 70_000))),
        bytes(1000),
        message.body,
        b"\r\n" * 1000,
    )
    return rng.choice(kinds), False, True


WIRE_MUTATIONS: dict[str, Callable[[Random, Message], Wire]] = {
    "query: raw bytes": raw_query,
    "length: chunks instead": chunked,
    "not HTTP: length too short": short_length,
    "not HTTP: no length": no_length,
    "not HTTP: length too long": long_length,
    "not HTTP: bad length": bad_length,
    "not HTTP: bad chunks": bad_chunks,
    "not HTTP: cut in the head": cut_head,
    "not HTTP: bad header lines": bad_head,
    "not HTTP: bad first line": bad_start,
    "not HTTP: something else": garbage,
}


FILES: dict[str, Callable[[Random], bytes]] = {**IMAGES, **VIDEOS}
"""Makers of files with a mutated structure, for requests to encode."""


def _with_header(message: Message, name: str, value: str) -> Message:
    others = tuple(pair for pair in message.headers if pair[0].lower() != name.lower())
    return replace(message, headers=(*others, (name, value)))


def _json_type(rng: Random) -> tuple[tuple[str, str], ...]:
    return (("Content-Type", rng.choice(("application/json", "tensor/base64"))),)


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _lines(message: Message, without: bytes = b"") -> list[bytes]:
    """Return the lines before the body without the header of this name, which is in lower case."""
    lines = message.head().removesuffix(b"\r\n\r\n").split(b"\r\n")
    return [line for line in lines if not without or not line.lower().startswith(without + b":")]


def _chunked_head(message: Message) -> bytes:
    return b"\r\n".join([*_lines(message, without=b"content-length"), b"Transfer-Encoding: chunked", b"", b""])


def _with_length(message: Message, length: str) -> bytes:
    lines = [*_lines(message, without=b"content-length"), b"Content-Length: " + length.encode(), b"", b""]
    return b"\r\n".join(lines) + message.body
