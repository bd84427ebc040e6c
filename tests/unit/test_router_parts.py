"""Permits, histories and links: the router's small parts."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from elasticmoe.common.protocol import rank as rank_messages
from elasticmoe.common.protocol import router as router_messages
from elasticmoe.common.protocol.errors import InvalidRequest, Overloaded
from elasticmoe.common.protocol.rank import Cancel
from elasticmoe.common.protocol.router import Failed
from elasticmoe.common.transport import AsyncClient, Server
from elasticmoe.services.router.dispatch.admission import ByteBudget, Permits
from elasticmoe.services.router.history import History
from tests.history import check_history


def test_permits() -> None:
    permits = Permits(3)
    with permits.acquire() as first, permits.acquire():
        with pytest.raises(Overloaded, match="2 requests are being served and 2 more are asked for; the limit is 3"):
            first.widen(3)
        first.widen(2)
        with pytest.raises(Overloaded):
            permits.acquire()
        with pytest.raises(InvalidRequest):
            first.widen(4)
        first.release()
        assert permits.num_held == 1
    assert permits.num_held == 0


def test_byte_budget() -> None:
    budget = ByteBudget(10)
    budget.take(8)
    with pytest.raises(Overloaded):
        budget.take(3)
    budget.give(8)
    budget.take(10)
    assert budget.num_held == 10


def record(path: Path) -> History:
    history = History(path, "router:1")
    history.accepted("a", prompt_tokens=1, max_tokens=2, rank="r0t0")
    history.resubmitted("a", "r0t0")
    history.resubmitted("a", "r2t0")
    history.chunk("a", 0, (5, 6))
    history.moved("a", "r1t0")
    return history


def test_a_good_history(tmp_path: Path) -> None:
    path = tmp_path / "h"
    history = record(path)
    history.flush()
    report = check_history(path, is_running=True)
    assert (report.num_tokens, report.num_moves) == (2, 1)
    history.terminal("a", "finish", "stop", tokens=2)
    history.accepted("b", prompt_tokens=1, max_tokens=2, rank="r0t0")
    history.terminal("b", "error", "rank_lost", retryable=True)
    history.close()
    history.close()
    report = check_history(path)
    assert (report.count("finish"), report.count("error", "rank_lost"), report.count("error", "x")) == (1, 1, 0)


@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (lambda h: h.flush(), "never ended"),
        (lambda h: h.terminal("b", "finish", "stop"), "never accepted"),
        (lambda h: h.chunk("a", 3, (1,)), "chunk at index 3 after 2 tokens"),
        (lambda h: h.chunk("a", 1, (1,)), "chunk at index 1 after 2 tokens"),
        (lambda h: h.chunk("a", 2, ()), "a chunk without tokens"),
        (lambda h: [h.terminal("a", "finish", "stop", tokens=2)] * 2, ""),
        (lambda h: (h.terminal("a", "finish", "stop", tokens=2), h.chunk("a", 2, (1,))), "after its end"),
        (lambda h: (h.terminal("a", "finish", "stop", tokens=2), h.terminal("a", "error", "x")), "after its end"),
        (lambda h: h.terminal("a", "finish", "stop", tokens=5), "chunks had 2"),
        (lambda h: h.terminal("a", "finish", "because", tokens=2), "ended as finish because"),
        (lambda h: h.accepted("a", prompt_tokens=1, max_tokens=2, rank="r0t0"), "accepted twice"),
        (lambda h: h.close(), "stopped while a ran"),
        (lambda h: h.moved("a", "r1t0"), "moved to r1t0, where it was"),
        (lambda h: h.moved("a", "r1t1"), "leads no replica"),
        (lambda h: h.moved("b", "r0t0"), "never accepted"),
        (lambda h: h.resubmitted("a", "r0t1"), "leads no replica"),
        (lambda h: (h.terminal("a", "finish", "stop", tokens=2), h.moved("a", "r0t0")), "after its end"),
        (lambda h: h._write({"event": "other", "id": "a"}), "is no event"),
    ],
)
def test_bad_histories(tmp_path: Path, spoil: object, finding: str) -> None:
    history = record(tmp_path / "h")
    spoil(history)  # type: ignore[operator]
    history.flush()
    if finding:
        with pytest.raises(AssertionError, match=finding):
            check_history(tmp_path / "h")
    else:
        check_history(tmp_path / "h")
    history.close()


def test_a_killed_router_cuts_its_requests_off(tmp_path: Path) -> None:
    path = tmp_path / "h"
    record(path).flush()
    with path.open("ab") as file:
        file.write(b'{"event":"chu')
    second = History(path, "router:2")
    second.close()
    assert check_history(path).cut_off == ["a"]
    path.write_bytes(path.read_bytes().replace(b'{"event":"chu\n', b'{"event":"chu\n{"event":"stop"}\n'))
    with pytest.raises(AssertionError, match="is not an event"):
        check_history(path)


def test_a_full_disk_ends_the_recording_only(tmp_path: Path) -> None:
    history = record(tmp_path / "h")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, history._fd)
    os.close(full)
    history.flush()
    history.chunk("a", 2, (1,))
    history.flush()
    history.close()


def test_no_history() -> None:
    history = History(None, "router:1")
    history.chunk("a", 0, (1,))
    history.close()


async def test_a_send_does_not_hide_an_incoming_message(tmp_path: Path) -> None:
    """ZeroMQ's descriptor is edge-triggered: a send may take the edge that announces a message."""
    stop = threading.Event()
    answered = threading.Semaphore(0)

    def serve() -> None:
        with closing(Server(tmp_path / "s.sock", "rank:1", rank_messages.CODEC)) as server:
            while not stop.is_set():
                server.poll(20)
                while (received := server.receive()) is not None:
                    assert isinstance(received[1].body, Cancel)
                    server.send(received[0], Failed(received[1].body.request_id, "x", "y", False))
                    answered.release()

    thread = threading.Thread(target=serve)
    thread.start()
    client = AsyncClient(tmp_path / "s.sock", "router:1", router_messages.CODEC)
    try:
        for turn in range(50):
            receiving = [asyncio.create_task(client.receive())]
            await asyncio.sleep(0)
            client.send(Cancel(f"{turn}"))
            answered.acquire(timeout=60)  # holds the event loop up: the answer now lies at the socket
            deadline = time.monotonic() + 0.002
            while time.monotonic() < deadline:
                pass  # a send looks at its mailbox again only after a while
            client.send(Cancel("again"))
            await asyncio.wait_for(receiving[0], 5.0)
            answered.acquire(timeout=60)
            await asyncio.wait_for(client.receive(), 5.0)
    finally:
        client.close()
        stop.set()
        thread.join()
