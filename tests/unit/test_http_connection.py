"""The guarded connection in a server of this process: who waits is cut off, who finds no place is told, and an answer
is heard whatever is still under way. Framing itself is tested against the real listeners, see test_http_framing.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import pytest_asyncio

from elasticmoe.common.http import connection, listener, orderly, places
from elasticmoe.common.http.connection import Rules
from elasticmoe.common.http.door import Door
from elasticmoe.common.http.listener import HttpServer, make_server

PLACES = 3
HELD = b"POST /held HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
NOW = b"GET /0 HTTP/1.1\r\nHost: x\r\n\r\n"
PROBE = b"GET /probe HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\nabc"


class App:
    """`/held` is answered when `release` is set, or never where the client leaves; `/read` when its body has come;
    every other path at once, with as many bytes as it says."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.left: asyncio.Queue[str] = asyncio.Queue()
        self.refused: list[int] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        if path == "/held":
            leaving = asyncio.ensure_future(self._left(receive))
            waiting = asyncio.ensure_future(self.release.wait())
            await asyncio.wait([leaving, waiting], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if leaving.done():
                self.left.put_nowait(path)
                return
            leaving.cancel()
        if path == "/read":
            while (message := await receive())["type"] != "http.disconnect" and message["more_body"]:
                pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        size = int(path[1:]) if path[1:].isdigit() else 2
        while size > 0:
            await send({"type": "http.response.body", "body": b"x" * min(size, 65_536), "more_body": True})
            size -= 65_536
        await send({"type": "http.response.body", "body": b""})

    @staticmethod
    async def _left(receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


class Serving:
    """A server with its app."""

    def __init__(self, sock: socket.socket, *, keep_alive_s: float = 5.0) -> None:
        self.app = App()
        rules = Rules(PLACES, 1_000, frozenset({"/probe"}), self.app.refused.append, guests_max=PLACES)
        self.server: HttpServer = make_server(cast(Door, self.app), rules, keep_alive_s=keep_alive_s, stop_s=2)
        self.address = sock.getsockname()
        self.task = asyncio.create_task(self.server.serve([sock]))
        self.clients: list[Client] = []

    async def stop(self) -> None:
        """Close all clients, then the server."""
        for client in self.clients:
            await client.close()
        self.app.release.set()
        self.server.stop()
        await asyncio.wait_for(self.task, 60)

    async def connect(self, said: bytes = b"") -> Client:
        reader, writer = await asyncio.open_connection(*self.address)
        client = Client(reader, writer)
        self.clients.append(client)
        if said:
            await client.say(said)
        return client

    @property
    def num_connections(self) -> int:
        return len(self.server.server_state.connections)

    async def settle(self, count: int) -> None:
        """Until there are `count` connections."""
        async with asyncio.timeout(60):
            while self.num_connections != count:
                await asyncio.sleep(0.005)


class Client:
    """One connection to it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def say(self, said: bytes) -> None:
        self._writer.write(said)
        await self._writer.drain()

    def end(self) -> None:
        """Close the sending side."""
        self._writer.write_eof()

    async def line(self) -> bytes:
        """The first line of an answer, whose rest is read too."""
        async with asyncio.timeout(60):
            head = await self._reader.readuntil(b"\r\n\r\n")
            if b"chunked" in head:
                await self._reader.readuntil(b"0\r\n\r\n")
            return head.partition(b"\r\n")[0]

    async def rest(self) -> bytes:
        """What comes until the server ends the connection, which it must do without a reset."""
        return await asyncio.wait_for(self._reader.read(), 60)

    async def refusal(self) -> tuple[bytes, str]:
        """The refusal's first line and its code; the connection ends with it."""
        head, _, body = (await self.rest()).partition(b"\r\n\r\n")
        assert b"\r\nconnection: close" in head
        assert (b" 503 " in head) == (b"retry-after: 1" in head)
        return head.partition(b"\r\n")[0], json.loads(body)["error"]["code"]

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


@pytest_asyncio.fixture
async def serving(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Serving]:
    monkeypatch.setattr(connection, "HEAD_SECONDS_MAX", 0.3)
    monkeypatch.setattr(connection, "GUEST_SECONDS_MAX", 0.3)
    monkeypatch.setattr(orderly, "STALLED_SECONDS_MAX", 0.3)
    monkeypatch.setattr(orderly, "LINGER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        serving = Serving(sock)
        while not serving.server.started:
            await asyncio.sleep(0.01)
        yield serving
        await serving.stop()


# ---- who waits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", b"\r\n"], ids=["nothing", "an empty line"])
async def test_who_begins_nothing_is_cut_off_without_a_word(serving: Serving, said: bytes) -> None:
    client = await serving.connect(said)
    assert await client.rest() == b""


@pytest.mark.parametrize("said", [b"G", b"GET /0 HTTP/1.1\r\nHost: x\r\nA: b", b"GET /0 HTTP/1.1\r\nHost: x\r\n\r"])
async def test_who_does_not_finish_a_head_is_told(serving: Serving, said: bytes) -> None:
    for before in (b"", NOW):
        client = await serving.connect(before)
        if before:
            assert await client.line() == b"HTTP/1.1 200 OK"
        await client.say(said)
        assert await client.refusal() == (b"HTTP/1.1 408 Request Timeout", "request_timeout")
    assert serving.app.refused == [408, 408]


async def test_a_head_that_trickles_in_has_one_deadline(serving: Serving) -> None:
    client = await serving.connect()
    try:
        async with asyncio.timeout(60):
            for byte in NOW[:-1] * 100:
                await client.say(bytes([byte]))
                await asyncio.sleep(0.02)
    except (ConnectionResetError, BrokenPipeError):
        pass
    assert serving.app.refused == [408]


async def test_the_rest_of_a_body_that_nobody_reads_has_a_deadline(serving: Serving) -> None:
    client = await serving.connect(b"POST /0 HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\nabc")
    assert await client.line() == b"HTTP/1.1 200 OK"
    assert await client.rest() == b""


async def test_who_does_not_read_is_cut_off(serving: Serving) -> None:
    with socket.create_connection(serving.address) as deaf:
        deaf.sendall(b"GET /1000000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        await serving.settle(1)
        await serving.settle(0)


async def test_who_reads_slowly_gets_the_whole_last_answer(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orderly, "STALLED_SECONDS_MAX", 30.0)  # this process reads: a busy machine may stop it as well
    with socket.create_connection(serving.address) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        slow.sendall(b"GET /4000000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        slow.setblocking(False)
        heard, loop = 0, asyncio.get_running_loop()
        async with asyncio.timeout(100):
            while chunk := await loop.sock_recv(slow, 65_536):
                heard += len(chunk)
                await asyncio.sleep(0.01)  # longer than LINGER_SECONDS altogether
    assert heard > 4_000_000


async def test_idle_connections_end_after_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        serving = Serving(sock, keep_alive_s=0.2)
        before = asyncio.get_running_loop().time()
        client = await serving.connect(NOW)
        assert await client.line() == b"HTTP/1.1 200 OK"
        assert await client.rest() == b""
        assert asyncio.get_running_loop().time() - before >= 0.2
        await serving.stop()


# ---- answers are heard -----------------------------------------------------------------------------------------------


async def test_a_refusal_is_heard_while_the_client_still_sends(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a lingering end the bytes that nobody has read would reset the connection, and the answer be lost."""
    monkeypatch.setattr(orderly, "LINGER_SECONDS", 5.0)  # this process sends: a busy machine may stop it as well
    for said in (
        b"GET /0 HTTP/1.1\r\nHost : x\r\n\r\n",
        b"POST /0 HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n",
    ):
        client = await serving.connect(said)
        for _ in range(20):
            await client.say(b"x" * 65_536)
        answer = await client.rest()
        assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 200 "))
        assert b"connection: close" in answer
        await client.close()
        await serving.settle(0)


async def test_a_client_that_hears_the_end_and_stays_is_not_waited_for(serving: Serving) -> None:
    client = await serving.connect(b"nonsense\r\n\r\n")
    await client.rest()
    await serving.settle(0)  # though the client has not closed


async def test_a_client_that_has_closed_its_side_gets_what_it_asked_to_read(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HALF_CLOSED_SECONDS", 60.0)
    for said in (NOW, PROBE * 3, b"HEAD /0 HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /held HTTP/1.0\r\n\r\n"):
        client = await serving.connect(said)
        client.end()
        if b"held" in said:
            await serving.settle(1)
            serving.app.release.set()
        answer = await client.rest()  # to the connection's end
        assert answer.count(b"HTTP/1.1 200 OK") == said.count(b" /")
    await serving.settle(0)


@pytest.mark.parametrize(
    "said", [HELD, HELD.replace(b"POST", b"GET"), POST, b"GET /0 HTTP/1.1\r\nHost", HELD + POST, NOW[:-2]]
)
async def test_a_client_that_has_closed_its_side_keeps_nothing_alive(
    serving: Serving, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HALF_CLOSED_SECONDS", 0.05)
    client = await serving.connect(said)
    client.end()
    assert await client.rest() == b""
    await serving.settle(0)


async def test_every_request_hears_that_its_client_left(serving: Serving) -> None:
    """Also one that others wait behind."""
    client = await serving.connect(HELD + NOW * 5)
    await serving.settle(1)
    await client.close()
    assert await asyncio.wait_for(serving.app.left.get(), 60) == "/held"


async def test_a_stop_lets_running_requests_end_and_nothing_else(serving: Serving) -> None:
    held = await serving.connect(HELD + NOW)
    idle = await serving.connect(NOW)
    await idle.line()
    serving.server.stop()
    assert await idle.rest() == b""
    serving.app.release.set()
    answer = await held.rest()
    assert answer.count(b"HTTP/1.1 200 OK") == 1
    await asyncio.wait_for(serving.task, 60)


# ---- places ----------------------------------------------------------------------------------------------------------


async def fill(serving: Serving, said: bytes) -> list[Client]:
    """A client in each place."""
    clients = [await serving.connect(said) for _ in range(PLACES)]
    await serving.settle(PLACES)
    return clients


async def test_the_connection_that_is_idle_longest_goes_first(serving: Serving) -> None:
    clients = []
    for _ in range(PLACES):
        clients.append(await serving.connect(NOW))
        await clients[-1].line()
    await clients[0].say(NOW)
    await clients[0].line()  # so the second one is idle longest
    another = await serving.connect(NOW)
    assert await another.line() == b"HTTP/1.1 200 OK"
    assert await clients[1].rest() == b""
    for client in (clients[0], clients[2]):
        await client.say(NOW)
        assert await client.line() == b"HTTP/1.1 200 OK"


async def test_where_all_work_the_refusal_is_an_answer_and_probes_are_served(serving: Serving) -> None:
    clients = await fill(serving, HELD)
    for said in (NOW, HELD, POST, b"GET /", b"", PROBE):
        client = await serving.connect(said)
        if said == PROBE:
            answer = await client.rest()
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert b"connection: close" in answer
        elif said == b"GET /":
            assert await client.refusal() == (b"HTTP/1.1 408 Request Timeout", "request_timeout")
        elif said:
            assert await client.refusal() == (b"HTTP/1.1 503 Service Unavailable", "too_many_connections")
        else:
            assert await client.rest() == b""
    assert serving.app.refused == [503, 503, 503, 408]
    serving.app.release.set()
    for client in clients:
        assert await client.line() == b"HTTP/1.1 200 OK"


async def test_probes_are_served_whatever_waits_beyond_the_places(serving: Serving) -> None:
    await fill(serving, HELD)
    for _ in range(3 * PLACES):
        await serving.connect(b"GET /pro")
    for _ in range(3):
        probing = await serving.connect(PROBE)
        assert (await probing.rest()).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("said", [b"", b"GET /0 HTTP/1.1\r\n", POST], ids=["nothing", "half a head", "half a body"])
async def test_who_does_not_finish_a_request_gives_way(
    serving: Serving, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS_MAX", 60.0)
    monkeypatch.setattr(places, "GRACE_S", 0.0)
    clients = await fill(serving, said)
    await clients[0].say(b"\r\n" if not said else b"x")  # has been read when the others have
    another = await serving.connect(NOW)
    assert await another.line() == b"HTTP/1.1 200 OK"
    answer = await clients[0].rest()
    told = {b"": b"", POST: b"HTTP/1.1 503 "}.get(said, b"HTTP/1.1 408 ")  # a head is read on as a guest's
    assert answer.startswith(told)
    assert bool(answer) == bool(said)


@pytest.mark.parametrize("is_used", [False, True], ids=["new", "idle"])
async def test_who_gives_way_is_answered_where_its_request_was_only_not_read_yet(
    serving: Serving, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy loop accepts the connections of a burst before it reads what they have sent."""
    monkeypatch.setattr(places, "GRACE_S", 0.0)
    clients = await fill(serving, NOW if is_used else b"")
    for client in clients if is_used else ():
        await client.line()
    await serving.connect(HELD)
    await serving.settle(PLACES + 1)
    await clients[0].say(NOW)
    assert await clients[0].line() == b"HTTP/1.1 200 OK"  # a request that is there goes before one that is not


async def test_a_guest_gets_a_place_that_has_become_free(serving: Serving) -> None:
    clients = await fill(serving, HELD)
    guest = await serving.connect(b"GET /0 HTTP/1.1\r\n")
    await serving.settle(PLACES + 1)
    await clients[0].close()
    await serving.settle(PLACES)
    await guest.say(b"Host: x\r\n\r\n")
    assert await guest.line() == b"HTTP/1.1 200 OK"
    await guest.say(NOW)
    assert await guest.line() == b"HTTP/1.1 200 OK"


# ---- the socket ------------------------------------------------------------------------------------------------------


def test_connections_are_bounded_by_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Rules(1_000, 1, frozenset(), lambda _: None)
    limits = {"soft": 556, "hard": 556}
    monkeypatch.setattr(listener.resource, "getrlimit", lambda _: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(listener.resource, "setrlimit", lambda _, wanted: limits.update(soft=wanted[0]))
    bounded = listener._within_descriptors(rules)
    assert (bounded.connections_max, bounded.guests_max) == (100, 100)
    limits["hard"] = 4_096
    bounded = listener._within_descriptors(rules)
    assert (bounded.connections_max, bounded.guests_max) == (1_000, 1_024)
    assert limits["soft"] == 4_096


def test_answers_bear_the_date_of_their_second(monkeypatch: pytest.MonkeyPatch) -> None:
    state, now = listener._State(), 1_000_000_000.9
    monkeypatch.setattr(listener.time, "time", lambda: now)
    assert state.default_headers == [(b"date", b"Sun, 09 Sep 2001 01:46:40 GMT")]
    now += 0.2
    assert state.default_headers == [(b"date", b"Sun, 09 Sep 2001 01:46:41 GMT")]
