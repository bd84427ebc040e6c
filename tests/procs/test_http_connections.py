"""A thousand connections at once, idle ones in all places, and bodies that do not come: everybody hears an answer, and
probes and honest clients are served (RFC 9112 section 9). Against a real router with its usual limits, and a scaler."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from elasticmoe.services.router.service import SPARE_CONNECTIONS
from elasticmoe.services.scaler.api.admin import CONNECTIONS_MAX
from tests.procs.router_harness import RouterProcess, serving
from tests.procs.scaler_harness import TOKEN, ScalerProcess

pytestmark = pytest.mark.procs

BURST = 1_000
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
DESCRIPTORS = 4_096


@dataclass(frozen=True)
class Target:
    """A listener: its port, how many places it has, and a request that is work."""

    port: int
    places: int
    work: bytes


@pytest.fixture(scope="module", autouse=True)
def _descriptors() -> Iterator[None]:
    """As many as the connections of these tests need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        pytest.skip(f"this process may open {hard} files, and {DESCRIPTORS} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(params=["router", "admin"])
def target(request: pytest.FixtureRequest, router: RouterProcess, scaler: ScalerProcess) -> Iterator[Target]:
    if request.param == "admin":
        head = f"GET /v1/config HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
        yield Target(scaler.port, CONNECTIONS_MAX, head.encode())
        return
    body = b'{"prompt":"x"}'
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    raw = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with serving(router):  # says "Hello!"
        yield Target(router.port, 2 * 256 + SPARE_CONNECTIONS, raw)


@pytest.fixture
def peak(target: Target, router: RouterProcess, scaler: ScalerProcess) -> Callable[[], int]:
    """The most resident memory that the listener's process has had, in bytes."""
    pid = next(process.process.pid for process in (router, scaler) if process.port == target.port)

    def read() -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))

    return read


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, target: Target, raw: bytes = b"") -> Client:
        """`raw` is sent at once: a client that is slow between the two is another's test."""
        sock = socket.create_connection(("127.0.0.1", target.port), timeout=60)
        sock.sendall(raw)
        sock.setblocking(False)
        return cls(*await asyncio.open_connection(sock=sock))

    async def ask(self, raw: bytes, *, timeout_s: float = 20.0) -> tuple[int, dict[str, str]]:
        """Status and headers; the body is read. A reset, or an end without an answer, fails the test."""
        async with asyncio.timeout(timeout_s):
            self._writer.write(raw)
            await self._writer.drain()
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
            body = await self._reader.readexactly(int(headers["content-length"]))
        status = int(head[0].split(" ")[1])
        if status >= 400:
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        return status, headers

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            pass  # ended by the listener


async def ask_once(target: Target, raw: bytes, *, timeout_s: float = 20.0) -> tuple[int, dict[str, str]]:
    client = await Client.connect(target, raw)
    try:
        return await client.ask(b"", timeout_s=timeout_s)
    finally:
        await client.close()


async def test_each_of_a_thousand_requests_at_once_hears_an_answer(target: Target) -> None:
    async def probe() -> float:
        begun = time.monotonic()
        assert (await ask_once(target, HEALTH))[0] == 200
        return time.monotonic() - begun

    answers = asyncio.gather(*(ask_once(target, target.work) for _ in range(BURST)))
    probes = [await probe() for _ in range(5)]
    statuses = Counter(status for status, _ in await answers)
    assert set(statuses) <= {200, 429, 503}, statuses
    assert statuses[200] >= target.places // 4, statuses
    assert all(headers["retry-after"] == "1" for status, headers in await answers if status != 200)
    assert max(probes) < 10.0  # all share two cores with the clients
    assert (await ask_once(target, target.work))[0] == 200


async def test_idle_connections_keep_nobody_out(target: Target) -> None:
    idle = [await Client.connect(target) for _ in range(target.places)]
    try:
        assert {(await client.ask(HEALTH))[0] for client in idle} == {200}
        for raw in (target.work, HEALTH) * 10:
            assert (await ask_once(target, raw))[0] == 200
        assert (await idle[-1].ask(target.work))[0] == 200, "the one that was used last has kept its place"
    finally:
        for client in idle:
            await client.close()


async def test_bodies_that_do_not_come_keep_nobody_out(target: Target) -> None:
    head = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\nContent-Length: 9\r\n\r\n{"
    slow = [await Client.connect(target) for _ in range(target.places)]
    try:
        for client in slow:
            client._writer.write(head % TOKEN.encode())
        async with asyncio.timeout(60):
            while (answer := await ask_once(target, target.work))[0] == 503:
                assert answer[1]["retry-after"] == "1"
                assert (await ask_once(target, HEALTH))[0] == 200
                await asyncio.sleep(0.05)
        assert answer[0] == 200
    finally:
        for client in slow:
            await client.close()


async def test_endless_heads_trailers_and_extensions_keep_no_memory(target: Target, peak: Callable[[], int]) -> None:
    """8 MB on each of six connections, for every part of a message that has no length of its own."""
    post = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\n" % TOKEN.encode()
    endless = {
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n": b"a: b\r\n" * 1_000,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\na: ": b"b" * 6_000,
        b"GET /": b"b" * 6_000,
        b"": b"\r\n" * 3_000,
        post + b"Transfer-Encoding: chunked\r\n\r\n0\r\n": b"a: b\r\n" * 1_000,
        post + b"Transfer-Encoding: chunked\r\n\r\n0\r\na: ": b"b" * 6_000,
        post + b"Transfer-Encoding: chunked\r\n\r\n1;a=": b"b" * 6_000,
    }
    before = peak()

    async def flood(begin: bytes, piece: bytes) -> None:
        client = await Client.connect(target)
        try:
            client._writer.write(begin)
            for _ in range(8_000_000 // len(piece)):
                client._writer.write(piece)
                await client._writer.drain()
        except ConnectionError:
            pass  # cut off
        await client.close()

    for begin, piece in endless.items():
        await asyncio.gather(*(flood(begin, piece) for _ in range(6)))
    assert peak() - before < 32 << 20
    assert (await ask_once(target, target.work))[0] == 200
