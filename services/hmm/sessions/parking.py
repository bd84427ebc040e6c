"""The HMM's side of the keeper channel: which descriptors the keeper shall hold, also after it was away."""

from __future__ import annotations

import select
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Final

from elasticmoe.common.clock import Clock
from elasticmoe.common.fdchannel import Channel, close_all, connect
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.errors import ElasticMoEError, ProtocolError, Unavailable
from elasticmoe.common.protocol.keeper import FROM_KEEPER, Fetch, Forget, Keep, Kept
from elasticmoe.common.protocol.limits import FDS_MAX
from elasticmoe.common.protocol.replies import Ack, Refused
from elasticmoe.common.telemetry import Logger

CATALOG: Final = "catalog"  # parked last: where it is, everything that it names is
_CALL_MS: Final = 2_000
_RETRY_MS: Final = 250  # a keeper that does not answer must not stop the HMM's loop for longer
_RETRY_EVERY_S: Final = 1.0
_UNANSWERED_MAX: Final = 256


class Parking:
    """Keeps the keeper up to date. `keep` and `forget` never fail: while the keeper is away they are remembered, and
    `retry` parks everything again once it is back. Belongs to the service's loop.

    A keeper that does not answer in time is not away: it has what it was sent, descriptors too, and takes it before it
    tells anybody what it holds. Its answers are taken when they come (`hear`).
    """

    def __init__(self, path: Path, identity: str, log: Logger, clock: Clock) -> None:
        self._clock = clock
        self._path = path
        self._identity = identity
        self._log = log
        self._channel: Channel[Kept | Ack | Refused] | None = None
        self._wanted: dict[str, int] = {}
        self._retry_at = 0.0
        self._num_unanswered = 0  # of what this connection's keeper was sent

    @property
    def is_connected(self) -> bool:
        """Whether the keeper was there at the last call."""
        return self._channel is not None

    def fileno(self) -> int:
        """The channel's descriptor, readable when there is something to `hear`; -1 while the keeper is away."""
        return self._channel.fileno() if self._channel else -1

    def connect(self, *, deadline_ms: int = _CALL_MS) -> None:
        """Connect. Raises Unavailable."""
        self._channel = connect(self._path, self._identity, FROM_KEEPER, deadline_ms=deadline_ms)
        self._num_unanswered = 0

    def fetch(self, *, deadline_ms: int = _CALL_MS) -> dict[str, int]:
        """All descriptors that the keeper holds, by name; now the caller's. Raises ElasticMoEError."""
        kept: dict[str, int] = {}
        try:
            while True:
                answer, fds = self._call(Fetch(after=max(kept, default="")), deadline_ms=deadline_ms)
                names = answer.names if isinstance(answer, Kept) else ()
                if len(names) != len(fds):
                    close_all(fds)
                    raise ProtocolError(f"the keeper sent {len(fds)} descriptors for {len(names)} names")
                kept.update(zip(names, fds, strict=True))
                if not names:
                    return kept
        except BaseException:
            close_all(kept.values())
            raise

    @property
    def names(self) -> set[str]:
        """Of what the keeper shall hold."""
        return set(self._wanted)

    def keep(self, fds: Mapping[str, int]) -> None:
        """Park descriptors under names. They stay the caller's, open until `forget`; nothing is to do for those that
        are parked already."""
        fresh = [name for name, fd in fds.items() if self._wanted.get(name) != fd]
        self._wanted.update(fds)
        for names in _batches(fresh):
            self._try(Keep(names), tuple(fds[name] for name in names))

    def forget(self, names: Iterable[str]) -> None:
        """Let the keeper close what it holds under these names."""
        for some in _batches(names):
            for name in some:
                self._wanted.pop(name, None)
            self._try(Forget(some))

    def _try(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        if self._channel is None:
            return
        try:
            is_behind = self._num_unanswered > 0
            self._channel.send(message, fds, deadline_ms=_CALL_MS)
            self._num_unanswered += 1
            self._take_answers(self._channel, 0 if is_behind else _CALL_MS)
        except ElasticMoEError as error:
            self.lose(error.message)

    def hear(self) -> None:
        """Take what has come: late answers, or the keeper's end. Does not wait."""
        if self._channel is None:
            return
        try:
            self._take_answers(self._channel, 0)
            if self._num_unanswered == 0 and self._channel.is_readable:
                self.lose("it closed the connection")
        except ElasticMoEError as error:
            self.lose(error.message)

    def _take_answers(self, channel: Channel[Kept | Ack | Refused], wait_ms: int) -> None:
        """Those that have come; waits so long for one where none has. Raises ElasticMoEError."""
        poller = select.poll()
        poller.register(channel.fileno(), select.POLLIN)
        while self._num_unanswered and poller.poll(wait_ms):
            received, fds = channel.receive(deadline_ms=_RETRY_MS)
            close_all(fds)
            self._num_unanswered -= 1
            if isinstance(received.body, Refused):
                raise ElasticMoEError(received.body.message, code=received.body.code)
        if self._num_unanswered > _UNANSWERED_MAX:
            raise Unavailable(f"it has not answered {self._num_unanswered} messages")

    def _call(
        self, message: Message, fds: tuple[int, ...] = (), *, deadline_ms: int = _CALL_MS
    ) -> tuple[Kept | Ack, list[int]]:
        if self._channel is None:
            raise Unavailable("the keeper is away")
        self._channel.send(message, fds, deadline_ms=deadline_ms)
        received, received_fds = self._channel.receive(deadline_ms=deadline_ms)
        if isinstance(received.body, Refused):
            close_all(received_fds)
            raise ElasticMoEError(received.body.message, code=received.body.code)
        return received.body, received_fds

    def lose(self, reason: str) -> None:
        """The keeper is gone: what it held is safe only in this process until it is back."""
        if self._channel is not None:
            self._log.warning("keeper lost", reason=reason)
            self._channel.close()
            self._channel = None
            self._num_unanswered = 0

    def retry(self) -> bool:
        """Where the keeper is away: try, now and then, to reach it and park everything. True when that worked now."""
        if self._channel is not None or self._clock.monotonic() < self._retry_at:
            return False
        self._retry_at = self._clock.monotonic() + _RETRY_EVERY_S
        try:
            self.connect(deadline_ms=_RETRY_MS)
            kept = self.fetch(deadline_ms=_RETRY_MS)
            close_all(kept.values())
            for names in _batches(sorted(set(kept) - set(self._wanted))):
                self._call(Forget(names), deadline_ms=_RETRY_MS)
            for names in _batches(sorted(self._wanted, key=lambda name: (name == CATALOG, name))):
                self._call(Keep(names), tuple(self._wanted[name] for name in names), deadline_ms=_RETRY_MS)
        except ElasticMoEError as error:
            self.lose(error.message)
            return False
        self._log.info("keeper is back", descriptors=len(self._wanted))
        return True

    def close(self) -> None:
        """Close the channel; the keeper goes on holding. Idempotent."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def _batches(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """As many at once as one message carries."""
    left = iter(names)
    while some := tuple(islice(left, FDS_MAX)):
        yield some
