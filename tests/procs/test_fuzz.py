"""100,000 inputs against every control socket of a running deployment: nobody exits, nobody is restarted, every bad
message is answered, and the streams that run meanwhile stay exact (promises P14 and P21)."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import socket
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.common.protocol import rank
from elasticmoe.common.protocol.codec import Message, encode
from elasticmoe.common.protocol.hmm import GetHmmStatus, SetMembership
from elasticmoe.common.protocol.ids import CommandId
from elasticmoe.common.protocol.keeper import Fetch
from elasticmoe.common.protocol.limits import PROTOCOL_VERSION
from elasticmoe.common.protocol.pool import GetPool, StopRank
from elasticmoe.common.protocol.rank import GetRankLoad
from elasticmoe.common.protocol.replies import Ack
from elasticmoe.common.protocol.scaler import CODEC, HmmStatus, PoolStatus, RankLoad, ToScaler
from elasticmoe.common.protocol.standby import Fork
from elasticmoe.common.transport import Client, Server, new_identity
from tests.procs.clients import check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.fuzz import SENDER, answer_of, framed, thrower
from tests.procs.gaps import TimedLoad
from tests.procs.integrity import ask, check_integrity
from tests.procs.router_fakes import FakeRank, layout_of
from tests.procs.router_harness import RouterProcess, write_model
from tests.procs.waiting import processes_of, wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow]

Deploy = Callable[..., Deployment]

SEED: int | None = None  # set it to what a failed run printed
SETTINGS: dict[str, Any] = {"max_sequences": 16, "kv_bytes": 4 << 20, "device_bytes": 64 << 20, "standbys": 1}
# By socket; 100,000 in all. A Unix stream socket takes one bad message per connection.
STREAMS = ("handles", "keeper", "pool-template")
NUMBERS = {"hmm": 26_000, "pool": 24_000, "rank-r0t0": 21_000, "rank-r1t0": 21_000, "signals": 2_000}
NUMBERS |= dict.fromkeys(STREAMS, 2_000)
ROUTER_NUMBER = 5_000
WINDOW = 200  # messages between two looks at the answers: fewer than any queue holds
CONNECTIONS = 16
ANSWER_MS = 20_000
BAD = {"protocol_error", "version_mismatch"}
# The question after each window, whose answer says that all before it were taken. None may have an effect, so that a
# scaler of epoch 0 asks the pool.
QUESTIONS: dict[str, Message] = {
    "hmm": GetHmmStatus(),
    "pool": StopRank(rank.RankId(0, 0), "nobody:0"),
    "rank": GetRankLoad(),
    "signals": GetHmmStatus(),  # windows have no answer; what is none is refused
}


class Peer:
    """A stranger at a ZeroMQ socket."""

    def __init__(self, path: Path, question: Message) -> None:
        self.answers: Counter[str] = Counter()  # by code, or type where it is no refusal
        self._client: Client[ToScaler] = Client(path, new_identity("fuzz"), CODEC)
        self._socket = self._client._socket
        self._question = question
        self._seq = 1_000_000

    def send(self, *frames: bytes) -> None:
        """Throw one input."""
        self._socket.send_multipart(frames)

    def settle(self) -> None:
        """Ask the question and take all answers until its own."""
        self._seq += 1
        self.send(encode(self._question, sender=SENDER, seq=self._seq))
        while True:
            assert self._socket.poll(ANSWER_MS), f"no answer to {self._question}; so far {self.answers}"
            seq, kind, code = answer_of(self._socket.recv())
            if seq == self._seq:
                return
            self.answers[code or kind] += 1

    def close(self) -> None:
        """Vanish."""
        self._client.close()


def receiver_of(name: str) -> str:
    return "rank" if name.startswith("rank-") else name


def throw_at_queue(path: Path, number: int, rng: random.Random) -> None:
    """Each bad message is answered as such, and nothing else is."""
    receiver = receiver_of(path.stem)
    thrown, peer = thrower(rng, receiver), Peer(path, QUESTIONS[receiver])
    try:
        for start in range(0, number, WINDOW):
            for _ in range(min(WINDOW, number - start)):
                peer.send(thrown.draw())
            peer.send(b"three", b"frames")  # counted, and not answered
            peer.settle()
        num_bad = sum(peer.answers[code] for code in BAD)
        assert num_bad == thrown.num_invalid, f"{path.stem}: {thrown.num_invalid} bad messages, answers {peer.answers}"
        assert peer.answers.keys() >= BAD
        assert "internal_error" not in peer.answers
    finally:
        peer.close()


def throw_at_stream(path: Path, number: int, rng: random.Random) -> None:
    """One input per connection, which then ends from either side; some come with descriptors."""
    thrown = thrower(rng, path.stem)
    with open(os.devnull) as null:
        while number > 0:
            connections = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(min(CONNECTIONS, number))]
            number -= len(connections)
            try:
                for connection in connections:
                    connection.settimeout(ANSWER_MS / 1e3)
                    connection.connect(os.fspath(path))
                    data = framed(thrown.draw(), rng)
                    fds = [null.fileno()] * rng.choice((0, 0, 0, 1, 3))
                    head = socket.send_fds(connection, [data[:4]], fds) if fds else connection.send(data[:4])
                    _send_rest(connection, data[head:])
                for connection in connections:
                    _read_to_the_end(connection)
            finally:
                for connection in connections:
                    connection.close()


def _send_rest(connection: socket.socket, data: bytes) -> None:
    """And nothing after it: nobody has to wait for a message that is promised and does not come."""
    try:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # refused before all was sent


def _read_to_the_end(connection: socket.socket) -> bytes:
    found = b""
    try:
        while part := connection.recv(1 << 16):
            found += part
    except ConnectionResetError:
        pass  # it ended that way
    return found


def throw_all(sockets: Path, rng: random.Random) -> None:
    for name in rng.sample(sorted(NUMBERS), len(NUMBERS)):
        started, path = time.monotonic(), sockets / f"{name}.sock"
        (throw_at_stream if name in STREAMS else throw_at_queue)(path, NUMBERS[name], rng)
        print(f"{name}: {NUMBERS[name]} inputs in {time.monotonic() - started:.1f} s")


def num_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def workers_of(deployment: Deployment) -> set[int]:
    """Processes of the pool: those of the router's texts come as there is work."""
    commands = processes_of(deployment.run_dir)
    return {pid for pid, command in commands.items() if "elasticmoe.services.worker" in command}


async def test_no_control_message_ends_or_harms_a_service(deploy: Deploy, model_folder: Callable[[str], Path]) -> None:
    seed = random.SystemRandom().getrandbits(32) if SEED is None else SEED
    print(f"\nseed {seed}")
    deployment = deploy("oracle", replicas=2, devices=3, **SETTINGS)
    sockets = deployment.run_dir / "sockets"
    listening = {path.stem for path in sockets.glob("*.sock")} - {"store", "admin"}  # Valkey's, and HTTP
    assert listening == set(NUMBERS), "every listening control socket is thrown at"
    assert deployment.admin("/v1/layout")["fence"] >= 1, "epoch 0 is refused"
    pids, ranks = deployment.pids, deployment.rank_pids()
    wait_until(lambda: deployment.admin("/v1/devices")["standby_processes"] == SETTINGS["standbys"], "standbys")
    workers = workers_of(deployment)
    held = {name: num_descriptors(pids[name]) for name in ("hmm", "keeper")}
    async with TimedLoad(deployment.base_url, clients=3, seed=5) as load:
        await load.wait_streams(3)
        await asyncio.to_thread(throw_all, sockets, random.Random(seed))
        wait_until(lambda: {name: num_descriptors(pids[name]) for name in held} == held, f"descriptors {held}")
        await load.wait_streams(3)
    assert (deployment.pids, deployment.rank_pids()) == (pids, ranks), "somebody was restarted"
    assert workers_of(deployment) == workers, "the template forks for its pool only"
    assert (load.broken, load.errors) == ([], {})
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 200
    assert isinstance(ask(deployment, "hmm", GetHmmStatus()), HmmStatus)
    assert isinstance(ask(deployment, "pool", GetPool()), PoolStatus)
    for name in ranks:
        assert isinstance(ask(deployment, f"rank-{name}", GetRankLoad()), RankLoad)
    check_integrity(deployment)
    # The keeper answers the HMM: a layout that needs new descriptors comes into force.
    assert deployment.scale(replicas=3)["phase"] == "done"
    assert deployment.scale(replicas=2)["phase"] == "done"
    assert deployment.stop().count("error") == 0


def test_no_message_of_a_rank_ends_or_harms_a_router(tmp_path: Path) -> None:
    """A router listens nowhere for control messages: who can speak to it is what it takes for a rank."""
    seed = random.SystemRandom().getrandbits(32) if SEED is None else SEED
    print(f"\nseed {seed}")
    run_dir = Path(tempfile.mkdtemp(prefix="em-"))
    router = RouterProcess(run_dir, write_model(tmp_path / "model"), layout_of(0))
    thrown = thrower(random.Random(seed), "router")
    try:
        with closing(Server(router.sockets / "rank-r0t0.sock", new_identity("rank-r0t0"), rank.CODEC)) as server:

            def router_of() -> bytes:
                received = server.receive()
                return received[0] if received is not None else b""

            peer = wait_until(router_of, "the router introduces itself")
            version = version_of(encode(Ack(), sender=SENDER), PROTOCOL_VERSION + 1)
            for _ in range(ROUTER_NUMBER):
                server._socket.send_multipart([peer, thrown.draw()])
                while server.receive() is not None:
                    pass  # cancels of what it does not know
            server._socket.send_multipart([peer, version])
            expected = thrown.num_invalid + 1
            wait_until(lambda: router.metric("elasticmoe:bad_messages_total") >= expected, f"{expected} are counted")
            assert router.get("/health").status_code == 200
        fake = FakeRank(router.sockets).start()
        try:
            router.wait_ready()
            assert router.http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        finally:
            fake.stop()
        router.stop()
    finally:
        router.kill()
        shutil.rmtree(run_dir, ignore_errors=True)


def version_of(raw: bytes, version: int) -> bytes:
    """A message as a process of another protocol version would send it."""
    marker = b"\xa7version"
    at = raw.index(marker) + len(marker)
    assert raw[at] == PROTOCOL_VERSION
    return raw[:at] + bytes([version]) + raw[at + 1 :]


def test_another_version_is_refused_on_every_socket(deploy: Deploy) -> None:
    deployment = deploy("oracle", replicas=1, **SETTINGS)
    sockets, pids = deployment.run_dir / "sockets", deployment.pids
    commands: dict[str, tuple[Message, ...]] = {
        "hmm": (GetHmmStatus(), SetMembership((), False)),
        "pool": (GetPool(), StopRank(rank.RankId(0, 0), "nobody:0")),
        "rank-r0t0": (GetRankLoad(), rank.Drain(CommandId("op", 0, 0, "drain"), ())),
    }
    for name, messages in commands.items():
        peer = Peer(sockets / f"{name}.sock", QUESTIONS[receiver_of(name)])
        try:
            for message in messages:
                for version in (0, PROTOCOL_VERSION + 1, 127):
                    # Under the highest epoch: it is not even looked at.
                    peer.send(version_of(encode(message, sender=SENDER, epoch=1 << 40, seq=3), version))
            peer.settle()
            assert peer.answers == {"version_mismatch": 6}
        finally:
            peer.close()
    for name, message in (("handles", Fetch()), ("keeper", Fetch()), ("pool-template", Fork())):
        raw = version_of(encode(message, sender=SENDER), PROTOCOL_VERSION + 1)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_MS / 1e3)
            connection.connect(os.fspath(sockets / f"{name}.sock"))
            connection.sendall(struct.pack("<I", len(raw)) + raw)
            answer = _read_to_the_end(connection)
        assert answer_of(answer[4:])[1:] == ("Refused", "version_mismatch"), name
    assert deployment.pids == pids
    check_integrity(deployment)
    assert isinstance(ask(deployment, "pool", GetPool()), PoolStatus)
    deployment.stop()
