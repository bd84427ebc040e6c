"""What a rank says to routers, and patience with those that its predecessor served.

A router's socket reconnects by itself, which takes some milliseconds; before that nothing can be sent to it. What a new
rank has to say is kept until then, for GRACE_S: a router that has not come by then is taken for gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.limits import LOGPROBS_MAX, MESSAGE_BYTES_MAX, REQUEST_ID_CHARS_MAX
from elasticmoe.common.protocol.router import Delta, Tokens, logprob_bytes
from elasticmoe.services.worker.engine.outcome import Outcome
from elasticmoe.services.worker.rank.request_times import RequestTimes

GRACE_S = 10.0
MESSAGES_MAX = 4096  # kept for one router: a step has one
TRY_S = 0.002  # between attempts
PORTION_BYTES = MESSAGE_BYTES_MAX // 2  # of one message with tokens; a single delta has at most so many (Engine.add)

_DELTA_BYTES = 4 * REQUEST_ID_CHARS_MAX + 64  # without ids and log probabilities


class Reports:
    """Owned by the rank's thread. `send(router, message)` is the transport's: False when the router is not connected.
    `drop` is called with a router that is gone: nothing that it asked for matters any more. `times`: the rank's, told
    before the tokens that they lead to.

    Nothing blocks. The order of messages to one router is kept.
    """

    def __init__(
        self, send: Callable[[bytes, Message], bool], drop: Callable[[bytes], None], times: RequestTimes
    ) -> None:
        self._times = times
        self._send = send
        self._drop = drop
        self._kept: dict[bytes, list[Message]] = {}
        self._until: dict[bytes, float] = {}
        self._try_at = 0.0

    @property
    def is_waiting(self) -> bool:
        """Whether a router is still to come: `turn` should be called within some milliseconds."""
        return bool(self._kept)

    @property
    def has_unsent(self) -> bool:
        """Whether something was said that no router has got yet."""
        return any(self._kept.values())

    def expect(self, routers: Iterable[bytes], now: float) -> None:
        """Keep what is said to these until they are connected."""
        for router in routers:
            self._kept.setdefault(router, [])
            self._until[router] = now + GRACE_S

    def report(self, outcome: Outcome) -> None:
        """Tell all that came of a step."""
        for router, suspected in outcome.suspected:
            self.tell(router, suspected)
        if self._times.has_begun:
            for router, times in self._times.tell(outcome):
                self.tell(router, times)
        for router, deltas in outcome.deltas.items():
            for message in tokens_of(deltas):
                self.tell(router, message)
        for router, failed in outcome.failures:
            self.tell(router, failed)

    def tell(self, router: bytes, message: Message) -> None:
        """Send or keep."""
        kept = self._kept.get(router)
        if not kept and self._send(router, message):
            self._kept.pop(router, None)
            return
        if kept is not None and len(kept) < MESSAGES_MAX:
            kept.append(message)
            return
        self._kept.pop(router, None)
        self._drop(router)

    def turn(self, now: float) -> None:
        """Send what can be sent. A router whose time is over is dropped."""
        if not self._kept or now < self._try_at:
            return
        self._try_at = now + TRY_S
        gone = []
        for router, kept in list(self._kept.items()):
            if kept and self._send(router, kept[0]):
                del self._kept[router]
                if not all(self._send(router, message) for message in kept[1:]):
                    gone.append(router)
            elif now > self._until[router]:
                del self._kept[router]
                gone.append(router)
        for router in gone:
            self._drop(router)


def tokens_of(deltas: Sequence[Delta]) -> Iterator[Tokens]:
    """A router's deltas in as many messages as they need. One of them is enough but where a step ends prompts with log
    probabilities, or where all tokens so far are told again."""
    if all(len(delta.ids) <= 1 and delta.prompt_logprobs is None for delta in deltas):
        yield Tokens(tuple(deltas))
        return
    part: list[Delta] = []
    left = PORTION_BYTES
    for delta in deltas:
        left -= _bytes_max(delta)
        if part and left < 0:
            yield Tokens(tuple(part))
            part, left = [], PORTION_BYTES - _bytes_max(delta)
        part.append(delta)
    yield Tokens(tuple(part))


def _bytes_max(delta: Delta) -> int:
    num_logprobs = len(delta.logprobs or ()) + len(delta.prompt_logprobs or ())
    num_top = max((len(logprob.top) for logprob in (delta.prompt_logprobs or ())[:1]), default=LOGPROBS_MAX)
    return _DELTA_BYTES + 5 * len(delta.ids) + num_logprobs * logprob_bytes(num_top)
