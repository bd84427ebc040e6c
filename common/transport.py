"""The only importer of zmq: one option block for all sockets, typed send and receive. Longer than 400 lines for that.

Each service binds one ROUTER socket at `<run>/sockets/<name>.sock` and answers there; whoever wants something of it
connects a DEALER. Sockets belong to the thread that made them. Nothing here blocks without a deadline.

Facts that shaped it: a second binder of an ipc path steals it silently, so a lock file is taken first; a ROUTER drops
messages to unknown peers unless ROUTER_MANDATORY is set; two peers with one identity lose messages, so identities are
`name:uuid`, one per incarnation; without ROUTER_HANDOVER a ROUTER that has not noticed the end of a connection ignores
the next one with its identity, for ever; queues are bounded and LINGER is 0, so a dead peer costs neither memory nor
exit time.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import zmq
import zmq.asyncio

from elasticmoe.common.protocol.codec import Codec, Message, Received, decode_envelope, encode
from elasticmoe.common.protocol.errors import Conflict, DeadlineExceeded, ElasticMoEError, ProtocolError, Unavailable
from elasticmoe.common.protocol.limits import MESSAGE_BYTES_MAX
from elasticmoe.common.protocol.replies import Refused, refusal

T = TypeVar("T")
POLLIN = zmq.POLLIN

_HIGH_WATER = 10_000  # messages queued to one peer; more means that the peer is gone or wedged
_NAMELESS = b"\0"  # begins ZeroMQ's names of peers without one: here, of a connection that was taken over
_PUSH_HIGH_WATER = 16  # of what may be lost: old news serve nobody
_OPTIONS: dict[int, int] = {
    zmq.LINGER: 0,
    zmq.SNDHWM: _HIGH_WATER,
    zmq.RCVHWM: _HIGH_WATER,
    zmq.MAXMSGSIZE: MESSAGE_BYTES_MAX,
    zmq.RECONNECT_IVL: 20,
    zmq.RECONNECT_IVL_MAX: 80,  # on one machine an attempt costs little, and streams wait for it
}


def new_identity(name: str) -> str:
    """`name:uuid`, unique per process incarnation."""
    return f"{name}:{uuid.uuid4().hex[:16]}"


def _configure(socket: Any, identity: str | None = None) -> None:
    for option, value in _OPTIONS.items():
        socket.setsockopt(option, value)
    if identity is not None:
        socket.setsockopt(zmq.IDENTITY, identity.encode())


class PathLock:
    """Exclusive right to bind the socket at `path`; held until `release` or the process's end."""

    def __init__(self, path: Path) -> None:
        """Raises Conflict when another process holds it."""
        self._fd = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise Conflict(f"socket {path.name} is in use by another process", code="already_running") from None

    def release(self) -> None:
        """Give the right back. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _bound_at(path: Path) -> tuple[int, int] | None:
    """Names the socket that is bound at `path`: numbers of files alone are given again."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


class Server(Generic[T]):
    """A bound ROUTER socket that receives one closed union of messages.

    Bad messages are counted in `num_bad` and answered with Refused where the envelope can be read; they never raise.
    Of two connections with one identity the later one is heard; what was not read of the former one is lost, as what
    is queued at its end is anyhow.
    One that `takes_over` binds the path though another process has bound it, which then hears no more of who follows
    the path (PushClient).
    """

    def __init__(self, path: Path, identity: str, codec: Codec[T], *, takes_over: bool = False) -> None:
        """Raises Conflict when another process has bound `path`, unless this one `takes_over`."""
        self.identity = identity
        self.num_bad = 0
        self._codec = codec
        self._lock = None if takes_over else PathLock(path)
        self._path = path
        path.unlink(missing_ok=True)
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        _configure(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # Routers open links to ranks that left and came back, and a PushClient comes again, under the same identity.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.IPC_FILTER_UID, os.geteuid())  # peers of other users are turned away
        self._socket.bind(f"ipc://{path}")
        os.chmod(path, 0o600)
        self._bound = _bound_at(path)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, POLLIN)

    def watch(self, fd: int) -> None:
        """See ServerEnd."""
        self._poller.register(fd, POLLIN)

    def unwatch(self, fd: int) -> None:
        """See ServerEnd."""
        if fd in self._poller:
            self._poller.unregister(fd)

    def poll(self, timeout_ms: int) -> set[int]:
        """See ServerEnd."""
        return {ready for ready, _ in self._poller.poll(timeout_ms) if isinstance(ready, int)}

    def receive(self) -> tuple[bytes, Received[T]] | None:
        """See ServerEnd."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            if len(frames) != 2 or frames[0].startswith(_NAMELESS):
                self.num_bad += 1
                continue
            try:
                return frames[0], self._codec.decode(frames[1])
            except ProtocolError as error:
                self.num_bad += 1
                self._answer_bad(frames[0], frames[1], error)

    def _answer_bad(self, peer: bytes, raw: bytes, error: ProtocolError) -> None:
        try:
            seq = decode_envelope(raw).seq
        except ProtocolError:
            seq = 0
        self.send(peer, refusal(error), seq=seq)

    def send(self, peer: bytes, body: Message, *, seq: int = 0, epoch: int = 0) -> bool:
        """See ServerEnd."""
        raw = encode(body, sender=self.identity, epoch=epoch, seq=seq)
        try:
            self._socket.send_multipart([peer, raw], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def is_connected(self, peer: bytes) -> bool:
        """See ServerEnd. What is sent for that says nothing."""
        try:
            self._socket.send_multipart([peer, b""], zmq.NOBLOCK)
        except zmq.Again:
            return True  # it reads nothing, so it has enough of them already
        except zmq.ZMQError:
            return False
        return True

    def has_path(self) -> bool:
        """See ServerEnd."""
        return _bound_at(self._path) == self._bound

    def close(self) -> None:
        """Close the socket, and remove its path where no other process has taken it over. Idempotent."""
        if not self._socket.closed:
            self._socket.close()
            self._context.term()
            if self.has_path():
                self._path.unlink(missing_ok=True)
            if self._lock is not None:
                Path(f"{self._path}.lock").unlink(missing_ok=True)
                self._lock.release()


class _Shared:
    """One context for all clients of a process and kind, and so one thread that moves their messages. It lives while
    one of them does. Any thread."""

    def __init__(self, kind: type[zmq.Context[Any]]) -> None:
        self._kind = kind
        self._lock = threading.Lock()
        self._context: zmq.Context[Any] | None = None
        self._num_users = 0

    def take(self) -> zmq.Context[Any]:
        """For one client, until `give_back`."""
        with self._lock:
            if self._context is None:
                self._context = self._kind()
            self._num_users += 1
            return self._context

    def give_back(self) -> None:
        """A client has closed its socket. Ends the context after the last one."""
        with self._lock:
            self._num_users -= 1
            if not self._num_users and self._context is not None:
                self._context.term()
                self._context = None


_contexts = _Shared(zmq.Context)
_async_contexts = _Shared(zmq.asyncio.Context)


class Client(Generic[T]):
    """A DEALER connected to one server; sends any message, receives one closed union. One thread may use it. Messages
    carry `identity` as their sender; to the socket it is unique among this process's."""

    _opened: ClassVar[Counter[tuple[Path, str]]] = Counter()

    def __init__(self, path: Path, identity: str, codec: Codec[T]) -> None:
        self.identity = identity
        self.epoch = 0
        self._codec = codec
        self._seq = 0
        self._socket = _contexts.take().socket(zmq.DEALER)
        # Answers to one that was closed are none to the next, whose questions have the same numbers.
        number = self._opened[path, identity]
        self._opened[path, identity] += 1
        _configure(self._socket, f"{identity}.{number}" if number else identity)
        self._name = path.stem
        self._socket.connect(f"ipc://{path}")

    def fileno(self) -> int:
        """See ClientEnd."""
        return int(self._socket.getsockopt(zmq.FD))

    def send(self, body: Message) -> int:
        """Queue a message without waiting; returns its seq. Raises Unavailable when the queue is full."""
        self._seq += 1
        try:
            self._socket.send(encode(body, sender=self.identity, epoch=self.epoch, seq=self._seq), zmq.NOBLOCK)
        except zmq.Again:
            raise Unavailable(f"{self._name} does not take messages") from None
        return self._seq

    def receive(self, timeout_ms: int = 0) -> Received[T] | None:
        """Take the next message, waiting at most `timeout_ms`; None when there is none. Raises ProtocolError."""
        if timeout_ms and not self._socket.poll(timeout_ms):
            return None
        try:
            raw = self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return self._codec.decode(raw)

    def call(self, body: Message, *, deadline_ms: int) -> tuple[T, list[Received[T]]]:
        """See ClientEnd."""
        seq = self.send(body)
        others: list[Received[T]] = []
        deadline = time.monotonic() + deadline_ms / 1e3
        while (left_ms := int((deadline - time.monotonic()) * 1e3)) > 0:
            received = self.receive(left_ms)
            if received is None:
                continue
            if received.seq != seq:
                others.append(received)
                continue
            if isinstance(received.body, Refused):
                received.body.raise_()
            return received.body, others
        raise DeadlineExceeded(f"{self._name} did not answer {type(body).__name__} within {deadline_ms} ms")

    def close(self) -> None:
        """Close the socket; what is queued is dropped. Idempotent."""
        if not self._socket.closed:
            self._socket.close()
            _contexts.give_back()


class AsyncClient(Generic[T]):
    """`Client` for one asyncio loop."""

    def __init__(self, path: Path, identity: str, codec: Codec[T]) -> None:
        self.identity = identity
        self.num_bad = 0
        self._codec = codec
        self._seq = 0
        self._name = path.stem
        self._socket = _async_contexts.take().socket(zmq.DEALER)
        _configure(self._socket, identity)
        self._socket.connect(f"ipc://{path}")

    def send(self, body: Message) -> int:
        """Queue a message without waiting; returns its seq. Raises Unavailable when the queue is full."""
        self._seq += 1
        raw = encode(body, sender=self.identity, seq=self._seq)
        # The asyncio socket's own send: the descriptor is edge-triggered, and a plain send may consume the edge that
        # announces an incoming message, which this one then looks for. With NOBLOCK the future is always done.
        sent: Any = self._socket.send(raw, zmq.NOBLOCK)
        if sent.exception() is not None:
            raise Unavailable(f"{self._name} does not take messages") from None
        return self._seq

    async def receive(self) -> Received[T]:
        """The next valid message; bad ones are counted and dropped. One task at a time may receive."""
        while True:
            raw = await self._socket.recv()
            try:
                return self._codec.decode(raw)
            except ProtocolError:
                self.num_bad += 1

    def close(self) -> None:
        """Close the socket; what is queued is dropped. Idempotent."""
        if not self._socket.closed:
            self._socket.close()
            _async_contexts.give_back()


class PushClient:
    """A DEALER that only sends, to one server that may be away: what does not go at once is lost. One thread may use
    it. What the server answers is not read. It follows the path: a server that was taken over may keep its connections,
    if it hangs."""

    def __init__(self, path: Path, identity: str) -> None:
        self.identity = identity
        self._path = path
        self._seq = 0
        self._context = _contexts.take()
        self._open()

    def _open(self) -> None:
        self._bound = _bound_at(self._path)
        self._socket = self._context.socket(zmq.DEALER)
        _configure(self._socket, self.identity)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # queue for a living connection only
        self._socket.setsockopt(zmq.SNDHWM, _PUSH_HIGH_WATER)
        self._socket.setsockopt(zmq.RCVHWM, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 200)  # nobody waits for it, and an idle process stays idle
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)
        self._socket.connect(f"ipc://{self._path}")

    def push(self, body: Message) -> bool:
        """Send without waiting. False when it is lost: the server is away or behind."""
        if _bound_at(self._path) not in (None, self._bound):
            self._socket.close()
            self._open()
        self._seq += 1
        try:
            self._socket.send(encode(body, sender=self.identity, epoch=0, seq=self._seq), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """Close the socket; what is queued is dropped. Idempotent."""
        if not self._socket.closed:
            self._socket.close()
            _contexts.give_back()


class Sockets:
    """The system's Transport (endpoints.py). `socket_of(name)`: the path of a service's socket."""

    def __init__(self, socket_of: Callable[[str], Path]) -> None:
        self._socket_of = socket_of

    def serve(self, name: str, identity: str, codec: Codec[T]) -> Server[T]:
        """See Transport."""
        return Server(self._socket_of(name), identity, codec)

    def take_over(self, name: str, identity: str, codec: Codec[T]) -> Server[T]:
        """See Transport."""
        return Server(self._socket_of(name), identity, codec, takes_over=True)

    def connect(self, name: str, identity: str, codec: Codec[T]) -> Client[T]:
        """See Transport."""
        return Client(self._socket_of(name), identity, codec)

    def connect_async(self, name: str, identity: str, codec: Codec[T]) -> AsyncClient[T]:
        """See Transport."""
        return AsyncClient(self._socket_of(name), identity, codec)

    def connect_push(self, name: str, identity: str) -> PushClient:
        """See Transport."""
        return PushClient(self._socket_of(name), identity)


def describe(error: ElasticMoEError) -> str:
    """`code: text`, for logs and command lines."""
    return f"{error.code}: {error.message}"
