"""The scaler's connections to one host: its HMM and its worker pool. The loop's thread only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from elasticmoe.common.endpoints import ClientEnd, arrived
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.hmm import GetHmmStatus
from elasticmoe.common.protocol.pool import GetPool, StartRank
from elasticmoe.common.protocol.scaler import CODEC, HmmStatus, PoolStatus, RankExited, ToScaler
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.scaler.cluster import HostStatus
from elasticmoe.services.scaler.parts import ScalerParts

log = get_logger("scaler")

CALL_MS = 2_000
STARTING_MS = 200
START_SECONDS_MAX = 60.0  # a rank that has not come by then is asked for again
QUIET_POOL_S = 2.0  # the pool tells by itself when a rank comes or ends; this is for a pool that has come anew

T = TypeVar("T", HmmStatus, PoolStatus)


class HostLink:
    """`on_event` gets what the pool tells unasked. `starting`: slot -> when its rank was asked for."""

    def __init__(self, parts: ScalerParts, pool_name: str, on_event: Callable[[ToScaler], None]) -> None:
        self._on_event = on_event
        self._clock = parts.clock
        self._hmm = parts.transport.connect("hmm", parts.identity, CODEC)
        self._pool = parts.transport.connect(pool_name, parts.identity, CODEC)
        self._pool_status: tuple[PoolStatus, float] | None = None  # its last answer, and when it was asked for
        self._attached: frozenset[str] = frozenset()  # ranks that the HMM knew to live, by incarnation
        self.starting: dict[int, float] = {}

    def act_under(self, fence: int) -> None:
        """Send everything with this fencing epoch from now on."""
        self._hmm.epoch = self._pool.epoch = fence

    def ask(self, *, is_starting: bool, is_quiet: bool) -> HostStatus:
        """What HMM and pool say now. `is_starting`: nothing has been served; `is_quiet`: nobody computes, and what the
        pool said lately will do where the HMM knows the same ranks."""
        hmm = self.ask_hmm()
        before, self._attached = self._attached, _attached_of(hmm)
        is_known = is_quiet and hmm is not None and self._attached == before
        return HostStatus(hmm, self.ask_pool(is_starting=is_starting, age_s_max=QUIET_POOL_S if is_known else 0.0))

    def ask_hmm(self) -> HmmStatus | None:
        """What the HMM says now; None when it does not answer in time."""
        return self._ask(self._hmm, GetHmmStatus(), HmmStatus, CALL_MS)

    def ask_pool(self, *, is_starting: bool, age_s_max: float = 0.0) -> PoolStatus | None:
        """What the pool says now, or said at most `age_s_max` ago if all ranks slept then and it has not told anything
        since. At start it imports for seconds; loading must not wait for it."""
        now = self._clock.monotonic()
        if self._pool_status is not None and now - self._pool_status[1] < age_s_max:
            said = self._pool_status[0]
            # A rank that ran then may have stopped since: the watchdog must not take it for one that still runs.
            if all(rank.is_asleep for rank in said.ranks):
                return said
        status = self._ask(self._pool, GetPool(), PoolStatus, STARTING_MS if is_starting else CALL_MS)
        self._pool_status = (status, now) if status is not None else None
        # A rank that was asked for is the pool's from its answer on: what the pool does not list has ended.
        now = self._clock.monotonic()
        coming = {rank.slot for rank in status.ranks if not rank.ready} if status else set(self.starting)
        self.starting = {
            slot: at for slot, at in self.starting.items() if slot in coming and now - at < START_SECONDS_MAX
        }
        return status

    def _ask(self, client: ClientEnd[ToScaler], question: Message, kind: type[T], deadline_ms: int) -> T | None:
        try:
            answer, events = client.call(question, deadline_ms=deadline_ms)
        except ElasticMoEError:
            return None
        for event in events:
            self._take(event.body)
        return answer if isinstance(answer, kind) else None

    def _take(self, event: ToScaler) -> None:
        """What somebody tells unasked. What the pool has said before is old then."""
        self._pool_status = None
        if isinstance(event, RankExited):
            self.starting.pop(event.slot, None)
        self._on_event(event)

    def tell_hmm(self, command: Message) -> None:
        """Send a command and wait for its answer. Raises ElasticMoEError: the refusal, or DeadlineExceeded."""
        self._hmm.call(command, deadline_ms=CALL_MS)

    def tell_pool(self, command: Message) -> None:
        """Send a command and wait for its answer. Raises ElasticMoEError: the refusal, or DeadlineExceeded."""
        self._pool_status = None
        _, events = self._pool.call(command, deadline_ms=CALL_MS)
        for event in events:
            self._take(event.body)

    def start(self, command: StartRank) -> None:
        """Let a standby take a seat. Raises ElasticMoEError."""
        self.tell_pool(command)
        self.starting[command.slot] = self._clock.monotonic()

    def filenos(self) -> tuple[int, int]:
        """Readable when something has come. Edge-triggered: `drain` has to be called before each wait."""
        return self._hmm.fileno(), self._pool.fileno()

    def drain(self) -> bool:
        """Handle all that has come; True where something of it was told unasked."""
        came = False
        for client in (self._pool, self._hmm):
            for received in arrived(client, log):
                if not received.seq:  # otherwise an answer that came too late
                    self._take(received.body)
                    came = True
        return came

    def close(self) -> None:
        """Close both connections."""
        self._hmm.close()
        self._pool.close()


def _attached_of(hmm: HmmStatus | None) -> frozenset[str]:
    return frozenset(device.attached for device in hmm.devices if device.attached) if hmm is not None else frozenset()
