"""HTTP spoken by hand to a listener: what is sent is bytes, and what comes back is told answer by answer."""

from __future__ import annotations

import json
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from tests.procs.router_fakes import WAIT_S
from tests.procs.router_harness import RouterProcess
from tests.procs.scaler_harness import TOKEN, ScalerProcess

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Process(Protocol):
    """What both harnesses have."""

    port: int

    @property
    def log_text(self) -> str: ...

    def metric(self, name: str) -> float: ...


@dataclass(frozen=True)
class Listener:
    """One listener with a request whose answer proves that its body came whole."""

    process: Process
    path: str
    proof: bytes
    status: int
    fields: tuple[str, ...] = ("Content-Type: application/json",)

    def body(self, size: int = 120) -> bytes:
        """A body of so many bytes."""
        begin, end = (b'{"tokens":[', b"88,89]}") if self.status == 200 else (b"{", b'"replicas":99999}')
        return begin + b" " * (size - len(begin) - len(end)) + end

    def head(self, *lines: str, method: str = "POST", version: str = "1.1", host: str | None = "localhost") -> bytes:
        """The head of a request with that body."""
        named = [f"Host: {host}"] if host is not None else []
        first = f"{method} {self.path} HTTP/{version}"
        return "\r\n".join([first, *named, *self.fields, *lines, "", ""]).encode("latin-1")

    def request(self, *lines: str, version: str = "1.1") -> bytes:
        """A whole request."""
        return self.head(f"Content-Length: {len(self.body())}", *lines, version=version) + self.body()

    def is_proof(self, answer: Answer) -> bool:
        """Whether the application saw the whole body."""
        return answer.status == self.status and self.proof in answer.body


@dataclass
class Answer:
    """One answer as it came."""

    version: str
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The error's code; its shape is checked."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return str(error["code"])


def router_listener(router: RouterProcess) -> Listener:
    """A router, by the text of tokens."""
    return Listener(router, "/detokenize", b'{"prompt":"XY"}', 200)


def admin_listener(scaler: ScalerProcess) -> Listener:
    """A scaler, by an order that exceeds a bound."""
    fields = ("Content-Type: application/json", f"Authorization: Bearer {TOKEN}")
    return Listener(scaler, "/v1/scale", b"at most 64; it is 99999", 400, fields)


def connect(listener: Listener) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", listener.process.port), WAIT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def send(connection: socket.socket, *pieces: bytes) -> None:
    """Each piece in a packet of its own: the peer has read one before the next one is sent."""
    for index, piece in enumerate(pieces):
        if index:
            wait_unread(connection)
        connection.sendall(piece)


def wait_unread(connection: socket.socket) -> None:
    """Until the kernel has handed over what was sent: nothing of it waits at the peer, who is on this machine."""
    ours, theirs = connection.getsockname(), connection.getpeername()
    deadline = time.monotonic() + WAIT_S
    local, remote = (f"0100007F:{port:04X}" for port in (theirs[1], ours[1]))
    pattern = re.compile(rf"^ *\d+: {local} {remote} \w\w \w{{8}}:(\w{{8}})", re.MULTILINE)
    while time.monotonic() < deadline:
        match = pattern.search(Path("/proc/net/tcp").read_text())
        if match is None or int(match[1], 16) == 0:
            return
    raise AssertionError("the listener does not read")


def hear(connection: socket.socket, *, until: int | None = None, is_head: bool = False) -> tuple[list[Answer], bool]:
    """The answers until the peer closes or there are `until`; and whether it has closed."""
    raw, answers = b"", []
    connection.settimeout(WAIT_S)
    while True:
        while (parsed := parse(raw, is_head=is_head)) is not None:
            answer, raw = parsed
            if answer.status != 100:
                answers.append(answer)
            if until is not None and len(answers) >= until:
                return answers, False
        chunk = connection.recv(65_536)
        if not chunk:
            if raw:  # a body that ends with the connection
                answer, rest = parse(raw, is_over=True) or pytest.fail(f"incomplete: {raw!r}")
                answers.append(answer)
                assert rest == b""
            return answers, True
        raw += chunk


def parse(raw: bytes, *, is_over: bool = False, is_head: bool = False) -> tuple[Answer, bytes] | None:
    """The first answer of `raw` and what follows; None while it is not complete."""
    head, separator, rest = raw.partition(b"\r\n\r\n")
    if not separator:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    version, status, _ = first.split(" ", 2)
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    answer = Answer(version, int(status), headers, b"")
    if answer.status in (100, 204) or is_head:
        return answer, rest
    if headers.get("transfer-encoding") == "chunked":
        while True:
            size, separator, after = rest.partition(b"\r\n")
            if not separator or len(after) < int(size, 16) + 2:
                return None
            answer.body += after[: int(size, 16)]
            rest = after[int(size, 16) + 2 :]
            if size == b"0":
                return answer, rest
    if "content-length" in headers:
        size = int(headers["content-length"])
        answer.body = rest[:size]
        return (answer, rest[size:]) if len(rest) >= size else None
    answer.body = rest
    return (answer, b"") if is_over else None


def ask(listener: Listener, *pieces: bytes) -> list[Answer]:
    """Send and hear all answers until the listener closes the connection."""
    with connect(listener) as connection:
        send(connection, *pieces)
        answers, is_closed = hear(connection)
        assert is_closed
        return answers


def ask_open(listener: Listener, *pieces: bytes, count: int = 1) -> list[Answer]:
    """Send and hear `count` answers; a health check proves that the connection then serves the next request."""
    with connect(listener) as connection:
        send(connection, *pieces)
        answers, _ = hear(connection, until=count)
        send(connection, HEALTH)
        more, _ = hear(connection, until=1)
        assert more[0].status == 200
        assert more[0].body == b'{"status":"ok"}'
        return answers


def chunked(body: bytes, size: int = 50, extension: bytes = b"", end: bytes = b"0\r\n\r\n") -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces) + end


def hear_until(connection: socket.socket, until: bytes, times: int = 1) -> bytes:
    """The bytes that come until `until` has come so often."""
    heard = b""
    while heard.count(until) < times:
        part = connection.recv(65_536)
        assert part, heard
        heard += part
    return heard


def hear_anyhow(connection: socket.socket) -> list[Answer]:
    """As `hear`, for a peer that may reset the connection."""
    try:
        return hear(connection)[0]
    except ConnectionResetError:
        return []
