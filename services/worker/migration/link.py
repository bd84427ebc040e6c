"""Questions of this rank to another rank or to the HMM, and their answers, without waiting for either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from elasticmoe.common.endpoints import ClientEnd, arrived
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.peer import ToPeer
from elasticmoe.common.telemetry import get_logger

log = get_logger("migration")

Subject = TypeVar("Subject")


class Link(Generic[Subject]):
    """A client and what each question under way is about. Owns the client; its descriptor is watched until `close`."""

    def __init__(
        self, client: ClientEnd[ToPeer], *, watch: Callable[[int], None], unwatch: Callable[[int], None]
    ) -> None:
        self._client = client
        self._fd = self._client.fileno()
        self._unwatch = unwatch
        self._asked: dict[int, Subject] = {}
        self.used_at = 0.0
        watch(self._fd)

    def ask(self, question: Message, subject: Subject, now: float) -> None:
        """Send; the answer comes out of `answers` with `subject`. Raises an ElasticMoEError when it cannot be sent."""
        self._asked[self._client.send(question)] = subject
        self.used_at = now

    def tell(self, message: Message, now: float) -> None:
        """Send without asking for the answer. One that cannot be sent is dropped."""
        try:
            self._client.send(message)
        except ElasticMoEError as error:
            log.warning("message dropped", kind=type(message).__name__, because=error.message)
        self.used_at = now

    def drop(self, subject: Subject) -> None:
        """Ignore the answers about `subject` that may still come."""
        self._asked = {seq: other for seq, other in self._asked.items() if other is not subject}

    def answers(self) -> Iterator[tuple[Subject, ToPeer]]:
        """What has come, without waiting."""
        for received in arrived(self._client, log):
            subject = self._asked.pop(received.seq, None)
            if subject is not None:
                yield subject, received.body

    def idle_s(self, now: float) -> float:
        """For how long it has had nothing to do; none while an answer is waited for, which `close` would lose."""
        return 0.0 if self._asked else now - self.used_at

    def close(self) -> None:
        """Drop what is queued and all answers."""
        self._unwatch(self._fd)
        self._client.close()
