"""Sockets on real Unix paths: typed answers, refusals, fencing, stolen paths, descriptors in flight."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from elasticmoe.common import fdchannel, transport
from elasticmoe.common.fence import Fence
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol import keeper, pool, rank, router, scaler, signals
from elasticmoe.common.protocol.codec import encode
from elasticmoe.common.protocol.errors import (
    Conflict,
    DeadlineExceeded,
    ElasticMoEError,
    Fenced,
    ProtocolError,
    Unauthorized,
    Unavailable,
)
from elasticmoe.common.protocol.keeper import Fetch, Keep, Kept
from elasticmoe.common.protocol.limits import PROTOCOL_VERSION
from elasticmoe.common.protocol.pool import GetPool, StopRank
from elasticmoe.common.protocol.replies import Ack, Refused
from elasticmoe.common.protocol.scaler import PoolStatus
from elasticmoe.common.transport import Client, PushClient, Server, new_identity
from tests.procs.waiting import wait_until


@pytest.fixture
def server(tmp_path: Path):  # type: ignore[no-untyped-def]
    with closing(Server(tmp_path / "pool.sock", new_identity("pool"), pool.CODEC)) as server:
        yield server


@pytest.fixture
def client(tmp_path: Path):  # type: ignore[no-untyped-def]
    client = Client(tmp_path / "pool.sock", new_identity("scaler"), scaler.CODEC)
    yield client
    client.close()


def answer(server: Server, body: object) -> threading.Thread:  # type: ignore[type-arg]
    """Answer one request with `body` from another thread's point of view: the caller waits in this one."""

    def serve() -> None:
        while (received := server.receive()) is None:
            server.poll(1_000)
        peer, message = received
        server.send(peer, body, seq=message.seq)  # type: ignore[arg-type]

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_call_returns_the_answer_and_events_that_came_before_it(server, client) -> None:  # type: ignore[no-untyped-def]
    def serve() -> None:
        while (received := server.receive()) is None:
            server.poll(1_000)
        peer, message = received
        server.send(peer, scaler.RankExited(RankId(0, 0), 0, "r:1", -9, "killed"))
        server.send(peer, PoolStatus(2, ()), seq=message.seq, epoch=4)

    thread = threading.Thread(target=serve)
    thread.start()
    status, events = client.call(GetPool(), deadline_ms=60_000)
    thread.join()
    assert status == PoolStatus(2, ())
    assert [event.body.exit_code for event in events] == [-9]


def test_refusal_is_raised_with_its_code(server, client) -> None:  # type: ignore[no-untyped-def]
    thread = answer(server, Refused("no_standby", "no standby process is ready", True))
    with pytest.raises(ElasticMoEError, match="no standby") as caught:
        client.call(GetPool(), deadline_ms=60_000)
    thread.join()
    assert (caught.value.code, caught.value.retryable) == ("no_standby", True)


def test_silence_ends_at_the_deadline(client) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DeadlineExceeded, match="did not answer GetPool within 50 ms"):
        client.call(GetPool(), deadline_ms=50)


def test_bad_messages_are_counted_answered_and_survived(server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    other = Client(tmp_path / "pool.sock", new_identity("stranger"), scaler.CODEC)
    other._socket.send(b"\xc1garbage")
    other._socket.send(
        msgpack.packb({"version": PROTOCOL_VERSION + 1, "epoch": 0, "sender": "x:1", "seq": 5, "body": None})
    )
    other._socket.send_multipart([b"three", b"frames"])
    other.send(rank.Watch())  # a valid message of another receiver
    other.send(GetPool())
    received = None
    while received is None:
        server.poll(1_000)
        received = server.receive()
    assert isinstance(received[1].body, GetPool)
    assert server.num_bad == 4
    codes = [other.receive(60_000).body.code for _ in range(3)]  # type: ignore[union-attr]
    assert sorted(codes) == ["protocol_error", "protocol_error", "version_mismatch"]
    other.close()


def test_peers_of_other_users_are_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only root could become another user; so the servers take another one for themselves, and we are the stranger.
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    listener = fdchannel.Listener(tmp_path / "k.sock")
    with closing(Server(tmp_path / "x.sock", new_identity("pool"), pool.CODEC)) as server:
        monkeypatch.undo()
        stranger = Client(tmp_path / "x.sock", new_identity("scaler"), scaler.CODEC)
        stranger.send(GetPool())
        server.poll(300)
        assert server.receive() is None
        stranger.close()
    channel = fdchannel.connect(tmp_path / "k.sock", "hmm:1", keeper.FROM_KEEPER)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(Unauthorized, match="peer uid"):
        listener.accept("keeper:1", keeper.TO_KEEPER)
    monkeypatch.undo()
    channel.close()
    listener.close()


def test_a_second_server_cannot_steal_the_path(server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Conflict, match="in use by another process"):
        Server(tmp_path / "pool.sock", new_identity("pool"), pool.CODEC)


def test_path_is_private_and_removed_at_the_end(tmp_path: Path) -> None:
    server = Server(tmp_path / "x.sock", new_identity("pool"), pool.CODEC)
    assert (tmp_path / "x.sock").stat().st_mode & 0o077 == 0
    server.close()
    server.close()
    assert list(tmp_path.iterdir()) == []


def test_send_to_a_peer_that_is_gone_says_so(server, client) -> None:  # type: ignore[no-untyped-def]
    assert server.send(b"nobody:1", Ack()) is False


def test_client_reaches_a_server_that_starts_later(tmp_path: Path) -> None:
    client = Client(tmp_path / "late.sock", new_identity("scaler"), scaler.CODEC)
    seq = client.send(StopRank(RankId(0, 0), "r:1"))
    with closing(Server(tmp_path / "late.sock", new_identity("pool"), pool.CODEC)) as server:
        received = None
        while received is None:
            server.poll(1_000)
            received = server.receive()
        assert received[1].seq == seq
    client.close()


def test_descriptors_travel_with_their_message(tmp_path: Path) -> None:
    listener = fdchannel.Listener(tmp_path / "k.sock")
    ours = fdchannel.connect(tmp_path / "k.sock", "hmm:1", keeper.FROM_KEEPER)
    theirs = listener.accept("keeper:1", keeper.TO_KEEPER)
    assert theirs is not None
    memfd = os.memfd_create("test")
    os.write(memfd, b"hello")
    ours.send(Keep(("a",)), (memfd,), epoch=7)
    received, fds = theirs.receive()
    assert (received.body, received.epoch, len(fds)) == (Keep(("a",)), 7, 1)
    assert os.pread(fds[0], 5, 0) == b"hello"
    assert os.get_inheritable(fds[0]) is False
    theirs.send(Kept(("a",)), (fds[0],))
    received_back, back = ours.receive()
    assert received_back.body == Kept(("a",))
    for fd in (memfd, *fds, *back):
        os.close(fd)
    theirs.close()
    with pytest.raises(Unavailable, match="closed"):
        ours.receive()
    ours.close()
    listener.close()
    assert list(tmp_path.iterdir()) == []


def test_descriptors_of_a_bad_message_are_closed(tmp_path: Path) -> None:
    listener = fdchannel.Listener(tmp_path / "k.sock")
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(str(tmp_path / "k.sock"))
    channel = listener.accept("keeper:1", keeper.TO_KEEPER)
    assert channel is not None
    before = set(os.listdir("/proc/self/fd"))
    socket.send_fds(raw, [b"\x03\x00\x00\x00abc"], [0, 1])
    with pytest.raises(ProtocolError):
        channel.receive()
    assert set(os.listdir("/proc/self/fd")) == before
    socket.send_fds(raw, [b"\xff\xff\xff\xff"], [])
    with pytest.raises(ProtocolError, match="exceeds the limit"):
        channel.receive()
    raw.close()
    channel.close()
    listener.close()


def test_peer_that_sends_half_a_message_meets_the_deadline(tmp_path: Path) -> None:
    listener = fdchannel.Listener(tmp_path / "k.sock")
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(str(tmp_path / "k.sock"))
    channel = listener.accept("keeper:1", keeper.TO_KEEPER)
    assert channel is not None
    raw.send(b"\x10\x00")
    with pytest.raises(DeadlineExceeded):
        channel.receive(deadline_ms=50)
    raw.close()
    channel.close()
    listener.close()


def test_a_listener_that_is_not_open_yet_refuses_at_once(tmp_path: Path) -> None:
    listener = fdchannel.Listener(tmp_path / "k.sock", is_open=False)
    with pytest.raises(Unavailable, match="k is not there"):
        fdchannel.connect(tmp_path / "k.sock", "rank:1", keeper.FROM_KEEPER)
    listener.open()
    fdchannel.connect(tmp_path / "k.sock", "rank:1", keeper.FROM_KEEPER).close()
    listener.close()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="nobody is not there"):
        fdchannel.connect(tmp_path / "nobody.sock", "hmm:1", keeper.FROM_KEEPER)


def test_fence_refuses_lower_epochs_also_after_a_restart(tmp_path: Path) -> None:
    fence = Fence(tmp_path, "hmm")
    fence.check(3, "scaler:a")
    fence.check(3, "scaler:a")
    fence.check(5, "scaler:b")
    with pytest.raises(Fenced, match="scaler:a acts under epoch 3; epoch 5 has been seen"):
        fence.check(3, "scaler:a")
    again = Fence(tmp_path, "hmm")
    assert again.epoch == 5
    with pytest.raises(Fenced):
        again.check(4, "scaler:a")
    assert again.num_refused == 1


def test_fence_lets_nothing_pass_that_it_cannot_make_durable(tmp_path: Path) -> None:
    fence = Fence(tmp_path / "gone", "hmm")
    with pytest.raises(Unavailable, match="epoch 1 cannot be made durable") as caught:
        fence.check(1, "scaler:a")
    assert (caught.value.code, fence.epoch) == ("storage_full", 0)


def test_fetch_is_a_message_of_the_keeper() -> None:
    assert keeper.TO_KEEPER.decode(transport.encode(Fetch(), sender="hmm:1")).body == Fetch()


def test_a_client_that_is_opened_again_at_once_is_answered(server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    identity = new_identity("scaler")
    for _ in range(20):
        client = Client(tmp_path / "pool.sock", identity, scaler.CODEC)
        thread = answer(server, PoolStatus(2, ()))
        assert client.call(GetPool(), deadline_ms=60_000)[0] == PoolStatus(2, ())
        thread.join()
        client.close()


def test_who_is_known_by_one_identity_is_heard_and_answered_by_its_latest_connection(tmp_path: Path) -> None:
    """A router's link to a rank that left and comes back: the rank was busy when the former one was closed."""
    with closing(Server(tmp_path / "rank.sock", new_identity("rank"), rank.CODEC)) as server, zmq.Context() as context:
        for _ in range(20):
            former, latest = (dealer(context, "router:1") for _ in range(2))
            former.connect(f"ipc://{tmp_path}/rank.sock")
            former.send(encode(rank.Watch(), sender="router:1"))
            assert hear(server) == (b"router:1", rank.Watch())
            former.send(encode(rank.Cancel("former"), sender="router:1"))  # unread, and so maybe lost
            former.close()
            connected = latest.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            latest.connect(f"ipc://{tmp_path}/rank.sock")
            latest.send(encode(rank.Cancel("latest"), sender="router:1"))
            assert connected.poll(5_000)  # the server finds its coming and the other's end at once
            latest.disable_monitor()
            connected.close()
            heard = hear(server)
            if heard == (b"router:1", rank.Cancel("former")):
                heard = hear(server)
            assert heard == (b"router:1", rank.Cancel("latest")), "under its name, and nothing under another one"
            assert server.send(b"router:1", Ack())
            assert latest.poll(5_000)
            assert router.CODEC.decode(latest.recv()).body == Ack()
            latest.close()
            while server.is_connected(b"router:1"):
                server.poll(10)
                server.receive()


def hear(server: Any) -> tuple[bytes, Any] | None:
    """Who says what next; None where nothing comes."""
    for _ in range(100):
        server.poll(50)
        if (received := server.receive()) is not None:
            return received[0], received[1].body
    return None


def dealer(context: Any, identity: str) -> Any:
    made = context.socket(zmq.DEALER)
    made.setsockopt(zmq.IDENTITY, identity.encode())
    made.setsockopt(zmq.LINGER, 0)
    return made


def test_clients_share_the_thread_that_moves_their_messages(server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def num_threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = num_threads()
    clients = [Client(tmp_path / "pool.sock", new_identity("scaler"), scaler.CODEC) for _ in range(5)]
    try:
        wait_until(lambda: num_threads() <= before + 2, "two threads of theirs")
        for client in clients:
            client.send(GetPool())
    finally:
        for client in clients:
            client.close()
            client.close()
    wait_until(lambda: num_threads() == before, "their threads have gone")
    with_another = Client(tmp_path / "pool.sock", new_identity("scaler"), scaler.CODEC)
    assert with_another.send(GetPool()) == 1
    with_another.close()


# ---- what may be lost ------------------------------------------------------------------------------------------------


def windows_of(server: Server, count: int) -> list[int]:  # type: ignore[type-arg]
    """The next ones that come. What the poll wakes for need not be a whole message yet."""
    numbers: list[int] = []

    def come() -> bool:
        server.poll(100)
        received = server.receive()
        if received is not None:
            numbers.append(received[1].body.number)
        return len(numbers) == count

    wait_until(come, f"{count} windows come", 60.0)
    return numbers


def test_what_is_pushed_arrives_in_order_and_nothing_waits_for_who_is_away(tmp_path: Path) -> None:
    path = tmp_path / "signals.sock"
    pusher = PushClient(path, new_identity("rank-r0t0"))
    assert not any(pusher.push(window(number)) for number in range(1, 4))
    for begin in (10, 20):  # a server, and the one that takes its place
        with closing(Server(path, new_identity("scaler"), signals.CODEC)) as server:
            wait_until(lambda at=begin: pusher.push(window(at)), "the connection is there", 60.0)
            assert pusher.push(window(begin + 1))
            assert windows_of(server, 2) == [begin, begin + 1]
        wait_until(lambda at=begin: not pusher.push(window(at + 9)), "the connection has gone", 60.0)
    pusher.close()
    pusher.close()


def test_who_takes_over_hears_what_is_pushed_though_the_one_before_hangs(tmp_path: Path) -> None:
    """A scaler that was stopped kept the socket, and with it all that routers and ranks told."""
    path = tmp_path / "signals.sock"
    pusher = PushClient(path, new_identity("router"))
    hanging = Server(path, new_identity("scaler"), signals.CODEC, takes_over=True)
    try:
        wait_until(lambda: pusher.push(window(1)), "the connection is there", 60.0)
        with closing(Server(path, new_identity("scaler"), signals.CODEC, takes_over=True)) as server:
            wait_until(lambda: pusher.push(window(2)), "it is the new one that has it", 60.0)
            assert windows_of(server, 1) == [2]
            hanging.close()  # it was woken, and ends
            late = PushClient(path, new_identity("rank-r0t0"))
            wait_until(lambda: late.push(window(3)), "the path is its successor's still", 60.0)
            assert windows_of(server, 1) == [3]
            late.close()
    finally:
        hanging.close()
        pusher.close()


def test_who_had_found_the_new_one_already_is_heard_after_it_has_looked_at_the_path_too(tmp_path: Path) -> None:
    """Its connection came back by itself before it saw that the path is another one's, and opened it anew: a second one
    with the same identity, of whom a scaler heard nothing as long as it lived."""
    path = tmp_path / "signals.sock"
    pusher = PushClient(path, "router:1")
    for number in range(1, 9):
        with closing(Server(path, new_identity("scaler"), signals.CODEC, takes_over=True)) as server:
            wait_until(lambda server=server: server.is_connected(b"router:1"), "the connection came by itself", 60.0)
            pusher.push(window(number))
            threading.Event().wait(0.1)  # as long as a turn of the scaler: both are there when it looks
            wait_until(
                lambda server=server, at=number: pusher.push(window(at)) and server.receive(), "it is heard", 10.0
            )
            assert server.is_connected(b"router:1")
    pusher.close()


def test_who_was_taken_over_in_its_turn_can_tell_and_takes_over_again(tmp_path: Path) -> None:
    """A scaler that was superseded and does not know it yet: when it ends, nobody would be at the path."""
    path = tmp_path / "signals.sock"
    pusher = PushClient(path, new_identity("router"))
    server = Server(path, new_identity("scaler"), signals.CODEC, takes_over=True)
    try:
        assert server.has_path()
        with closing(Server(path, new_identity("scaler"), signals.CODEC, takes_over=True)) as old:
            assert (server.has_path(), old.has_path()) == (False, True)
        assert not server.has_path()
        server.close()
        server = Server(path, new_identity("scaler"), signals.CODEC, takes_over=True)
        assert server.has_path()
        wait_until(lambda: pusher.push(window(1)), "the connection is there", 60.0)
        assert windows_of(server, 1) == [1]
    finally:
        server.close()
        pusher.close()


def test_who_pushes_is_connected_until_its_process_ends_whether_it_reads_or_not(tmp_path: Path) -> None:
    path = tmp_path / "signals.sock"
    pusher = PushClient(path, "router:1")
    with closing(Server(path, new_identity("scaler"), signals.CODEC, takes_over=True)) as server:
        assert not server.is_connected(b"router:1")
        wait_until(lambda: pusher.push(window(1)), "the connection is there", 60.0)
        assert windows_of(server, 1) == [1]
        assert all(server.is_connected(b"router:1") for _ in range(5_000))
        assert not server.is_connected(b"router:2")
        pusher.close()
        wait_until(lambda: not server.is_connected(b"router:1"), "the connection has gone", 60.0)


def test_who_does_not_take_what_is_pushed_does_not_stop_who_pushes(tmp_path: Path) -> None:
    path = tmp_path / "signals.sock"
    pusher = PushClient(path, new_identity("router"))
    with closing(Server(path, new_identity("scaler"), signals.CODEC)) as server:
        wait_until(lambda: pusher.push(window(1)), "the connection is there", 60.0)
        assert not all(pusher.push(window(number + 2)) for number in range(100_000)), "the queues are bounded"
        assert windows_of(server, 3) == [1, 2, 3]
    pusher.close()


def window(number: int) -> signals.RankWindow:
    return signals.RankWindow(
        rank=RankId(0, 0), incarnation="rank-r0t0:1", number=number, epoch=1, ended_s=1.0, span_s=1.0
    )
