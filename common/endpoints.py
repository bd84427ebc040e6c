"""What services, ranks and routers need of a transport. The system's is made of sockets (transport.py); the simulation
of the tests has its own.

Addresses are names of services: `hmm`, `pool`, `rank-r0t0`. An end belongs to the thread that made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

from elasticmoe.common.protocol.codec import Codec, Message, Received
from elasticmoe.common.protocol.errors import ProtocolError
from elasticmoe.common.telemetry import Logger

T = TypeVar("T")


class ServerEnd(Protocol[T]):
    """Where a service receives one closed union of messages, and answers."""

    def watch(self, fd: int) -> None:
        """Let `poll` also return when `fd` is readable."""

    def unwatch(self, fd: int) -> None:
        """Undo `watch`. Idempotent."""

    def poll(self, timeout_ms: int) -> set[int]:
        """Wait until a message or a watched descriptor is ready, at most `timeout_ms`: the readable descriptors."""

    def receive(self) -> tuple[bytes, Received[T]] | None:
        """The next valid message without waiting: (peer, message), or None when there is none."""

    def send(self, peer: bytes, body: Message, *, seq: int = 0, epoch: int = 0) -> bool:
        """Send without waiting. False when the peer is unknown or its queue is full: it is gone or wedged."""

    def is_connected(self, peer: bytes) -> bool:
        """Whether a peer that only pushes, and reads nothing, has its connection still. It may hang: a connection ends
        with its process."""

    def has_path(self) -> bool:
        """Whether who connects now comes here: another process may have taken the name over, and may be gone again."""

    def close(self) -> None:
        """End it. Idempotent."""


class ClientEnd(Protocol[T]):
    """A connection to one service, by which questions go and answers come; only `call` waits. `epoch`: the fencing
    epoch that messages are sent under, 0 at first."""

    epoch: int

    def fileno(self) -> int:
        """An edge-triggered descriptor: after it is readable, `receive` until None."""

    def send(self, body: Message) -> int:
        """Queue a message; its seq. Raises Unavailable when the queue is full."""

    def receive(self) -> Received[T] | None:
        """The next message, None when there is none. Raises ProtocolError."""

    def call(self, body: Message, *, deadline_ms: int) -> tuple[T, list[Received[T]]]:
        """Send and wait for the answer: (answer, other messages that came meanwhile). Raises DeadlineExceeded, or the
        refusal as an ElasticMoEError with its code."""

    def close(self) -> None:
        """Drop what is queued. Idempotent."""


def arrived(end: ClientEnd[T], log: Logger, **facts: Any) -> Iterator[Received[T]]:
    """All that has come, without waiting. What cannot be decoded is logged, with `facts`, and passed over."""
    while True:
        try:
            received = end.receive()
        except ProtocolError as error:
            log.warning("bad message", because=error.message, **facts)
            continue
        if received is None:
            return
        yield received


class AsyncClientEnd(Protocol[T]):
    """`ClientEnd` for one asyncio loop. `num_bad`: messages that could not be decoded, and were dropped."""

    @property
    def num_bad(self) -> int:
        """See the class."""

    def send(self, body: Message) -> int:
        """Queue a message; its seq. Raises Unavailable when the queue is full."""

    async def receive(self) -> Received[T]:
        """The next valid message. One task at a time may receive."""

    def close(self) -> None:
        """Drop what is queued. Idempotent."""


class PushEnd(Protocol):
    """A connection to one service that only takes what is told: what it cannot take now is lost. Nothing waits in it
    for a service that is away, so what comes is never old news."""

    def push(self, body: Message) -> bool:
        """Send without waiting. False when it is lost: the service is away or behind."""

    def close(self) -> None:
        """Drop what is queued. Idempotent."""


class Transport(Protocol):
    """Makes ends. `identity` is the sender's in messages, one per incarnation."""

    def serve(self, name: str, identity: str, codec: Codec[T]) -> ServerEnd[T]:
        """Receive as `name`. Raises Conflict where another process does."""

    def take_over(self, name: str, identity: str, codec: Codec[T]) -> ServerEnd[T]:
        """Receive as `name` from now on, whoever does it now: for what is pushed to who holds a lease."""

    def connect(self, name: str, identity: str, codec: Codec[T]) -> ClientEnd[T]:
        """To the service of that name, which need not be there yet."""

    def connect_async(self, name: str, identity: str, codec: Codec[T]) -> AsyncClientEnd[T]:
        """The same for an asyncio loop."""

    def connect_push(self, name: str, identity: str) -> PushEnd:
        """To the service of that name, for what may be lost."""
