"""The scaler's connections to the HMM, the worker pool and the ranks. The loop's thread only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from elasticmoe.common.capacity import load_of
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.endpoints import ClientEnd
from elasticmoe.common.layout import Layout, Seat
from elasticmoe.common.model_spec import ModelSpec
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.errors import ElasticMoEError, ProtocolError
from elasticmoe.common.protocol.hmm import GetHmmStatus
from elasticmoe.common.protocol.pool import GetPool, StartRank
from elasticmoe.common.protocol.scaler import CODEC, HmmStatus, PoolStatus, ToScaler
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.scaler.control.peers import Peers
from elasticmoe.services.scaler.parts import ScalerParts

log = get_logger("scaler")

CALL_MS = 2_000
STARTING_MS = 200
START_SECONDS_MAX = 60.0  # a rank that has not come by then is asked for again

T = TypeVar("T", HmmStatus, PoolStatus)


class Links:
    """`on_event` gets what the pool tells unasked. `starting`: slot -> when its rank was asked for."""

    def __init__(
        self, config: ScalerConfig, spec: ModelSpec, parts: ScalerParts, on_event: Callable[[ToScaler], None]
    ) -> None:
        self._config = config
        self._spec = spec
        self._on_event = on_event
        self._clock = parts.clock
        self._poller = parts.poller
        self._new_identity = parts.new_identity
        self._hmm = parts.transport.connect("hmm", parts.identity, CODEC)
        self._pool = parts.transport.connect(config.pool_name, parts.identity, CODEC)
        self._pool_status: tuple[PoolStatus, float] | None = None  # its last answer, and when it was asked for
        self.peers = Peers(parts.transport, parts.identity, parts.clock)
        self.starting: dict[int, float] = {}

    def act_under(self, fence: int) -> None:
        """Send everything with this fencing epoch from now on."""
        self._hmm.epoch = self._pool.epoch = self.peers.epoch = fence

    def ask_hmm(self) -> HmmStatus | None:
        """What the HMM says now; None when it does not answer in time."""
        return self._ask(self._hmm, GetHmmStatus(), HmmStatus, CALL_MS)

    def ask_pool(self, *, is_starting: bool, age_s_max: float = 0.0) -> PoolStatus | None:
        """What the pool says now, or said at most `age_s_max` ago if it has not told anything since. At start it
        imports for seconds; loading must not wait for it."""
        now = self._clock.monotonic()
        if self._pool_status is not None and now - self._pool_status[1] < age_s_max:
            return self._pool_status[0]
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

    def load(self, layout: Layout) -> None:
        """Let the HMM load the model for `layout`. Raises ElasticMoEError."""
        self.tell_hmm(load_of(self._config, self._spec, layout))

    def start(self, seat: Seat, epoch: int) -> None:
        """Let a standby take `seat` of the layout of `epoch`. Raises ElasticMoEError."""
        self.tell_pool(
            StartRank(
                rank=seat.rank,
                slot=seat.slot,
                device=seat.device,
                incarnation=self._new_identity(f"rank-{seat.rank}"),
                epoch=epoch,
                max_tokens=self._config.max_tokens_per_step,
                max_sequences=self._config.max_sequences,
                max_model_len=min(self._config.max_model_len, self._spec.max_positions),
                compute=self._config.compute_backend,
            )
        )
        self.starting[seat.slot] = self._clock.monotonic()

    def wait(self, wait_s: float, *, is_quiet: bool = False) -> None:
        """Until something comes, at most `wait_s`; where it is quiet, until something is told unasked or somebody wakes
        this. What has come is handled."""
        deadline = self._clock.monotonic() + wait_s
        # The sockets' descriptors are edge-triggered: they have to be drained before each wait.
        while not self._drain() and (left_s := deadline - self._clock.monotonic()) > 0:
            fds = (self._hmm.fileno(), self._pool.fileno(), *self.peers.filenos())
            if self._poller.poll(fds, left_s) or not is_quiet:
                self._drain()
                return

    def _drain(self) -> bool:
        self.peers.receive()
        came = False
        for client in (self._pool, self._hmm):
            while True:
                try:
                    received = client.receive()
                except ProtocolError as error:
                    log.warning("bad message", because=error.message)
                    continue
                if received is None:
                    break
                if not received.seq:  # otherwise an answer that came too late
                    self._take(received.body)
                    came = True
        return came

    def close(self) -> None:
        """Close all connections."""
        self._hmm.close()
        self._pool.close()
        self.peers.close()
