"""The scaler's loop: observe, decide, act. One thread; the admin listener runs beside it and reads snapshots."""

from __future__ import annotations

import signal
import time
from collections import deque
from pathlib import Path
from types import FrameType

import msgspec

from common.config import ScalerConfig
from common.families import load_spec
from common.fence import Fence
from common.layout import Layout, initial_layout
from common.protocol.errors import ConfigError, ElasticMoEError, Fenced, ProtocolError, Unavailable
from common.protocol.hmm import GetHmmStatus, LoadModel, SetMembership
from common.protocol.pool import GetPool, StartRank
from common.protocol.scaler import CODEC, HmmStatus, PoolStatus, RankExited, RankReady, ToScaler
from common.store import Event, Store
from common.telemetry import get_logger
from common.transport import Client, new_identity
from services.scaler.admin import Board, Snapshot
from services.scaler.core import Action, CommitLayout, Decision, Load, Observed, Publish, Start, decide

log = get_logger("scaler")

CALL_MS = 2_000
STARTING_MS = 200
TURN_MS = 50
BACKOFF_S = 0.1  # doubles with each exit of a seat in the window
BACKOFF_S_MAX = 5.0
START_SECONDS_MAX = 60.0  # a rank that has not come by then is asked for again


class Scaler:
    """Owns the layout. Everything in it belongs to the loop's thread; `board` is read by the admin listener."""

    def __init__(self, config: ScalerConfig, store: Store) -> None:
        """Raises CheckpointError for a model that cannot be read, ConfigError for devices that make no replicas."""
        self._config = config
        self._store = store
        self._identity = new_identity("scaler")
        self._spec = load_spec(Path(config.model), config.dtype)
        self._hmm: Client[ToScaler] = Client(config.socket("hmm"), self._identity, CODEC)
        self._pool: Client[ToScaler] = Client(config.socket(config.pool_name), self._identity, CODEC)
        self._fence = Fence(config.state_dir, "scaler")
        self._layout: Layout | None = None
        self._committed_epoch = 0
        self._starting: dict[int, float] = {}  # slot -> when its rank was asked for
        self._exits: dict[int, deque[float]] = {}  # slot -> when its last ranks ended
        self._backoff_until = 0.0
        self._last_exit = ""
        self._ever_served = False
        self._stopping = False
        self._last_reason = ""
        self._lease_until = 0.0
        settings = {k: v for k, v in msgspec.structs.asdict(config).items() if k != "store_url"}
        self.board = Board(Snapshot("starting", "", None, None, None, None, 0, settings))

    def stop(self, *_: int | FrameType | None) -> None:
        """Signal handler: only records."""
        self._stopping = True

    def run(self) -> None:
        """Serve until a signal comes. Raises Fenced when another scaler has taken over."""
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        try:
            fence = self._acquire_lease()
            while not self._stopping:
                self._keep_lease()
                self._turn(fence)
        finally:
            self._hmm.close()
            self._pool.close()
            self._release_lease()

    # ---- the lease ------------------------------------------------------------------------------------------------

    def _acquire_lease(self) -> int:
        waiting_for = ""
        while not self._stopping:
            try:
                # Above all epochs that this host has seen, also when the store was wiped or rolled back.
                got = self._store.acquire_lease(self._identity, self._config.lease_ms, self._fence.epoch)
            except Unavailable as error:
                got = error.message
            if isinstance(got, int):
                self._fence.check(got, self._identity)
                self._hmm.epoch = self._pool.epoch = got
                self._lease_until = time.monotonic() + self._config.lease_ms / 1e3
                log.info("lease acquired", fence=got)
                return got
            if got != waiting_for:
                log.info("waiting for the lease", because=got)
                waiting_for = got
            time.sleep(self._config.lease_ms / 10e3)
        return 0

    def _keep_lease(self) -> None:
        """Renew at half time. An outage of the store ends no scaler: fencing keeps two from acting on the resources."""
        if time.monotonic() < self._lease_until - self._config.lease_ms / 2e3:
            return
        self._lease_until = time.monotonic() + self._config.lease_ms / 1e3
        try:
            if not self._store.renew_lease(self._identity, self._config.lease_ms):
                raise Fenced("another scaler holds the lease")
        except Unavailable as error:
            log.warning("lease could not be renewed", because=error.message)

    def _release_lease(self) -> None:
        try:
            self._store.release_lease(self._identity)
        except Unavailable as error:
            log.warning("lease could not be released", because=error.message)

    # ---- one turn -------------------------------------------------------------------------------------------------

    def _turn(self, fence: int) -> None:
        hmm = self._ask_hmm()
        pool = self._ask_pool()
        # What the HMM holds is in force, whatever this scaler's own configuration would make of it.
        layout = hmm.layout if hmm and hmm.layout else self._layout or self._first_layout()
        if hmm is not None and hmm.phase != "loading":
            self._layout = layout
        now = time.monotonic()
        self._forget_starts(pool, now)
        seen = Observed(
            hmm=hmm,
            pool=pool,
            committed_epoch=self._committed_epoch,
            starting=frozenset(self._starting),
            ever_served=self._ever_served,
            restarts_left=self._config.rank_restarts_max - self._recent_exits(now) + 1,
            is_backing_off=now < self._backoff_until,
            last_exit=self._last_exit,
        )
        decision = decide(layout, seen)
        self._show(decision, hmm, pool, fence)
        for action in decision.actions:
            self._act(action, layout)
        if not decision.actions:
            self._take_events(TURN_MS)

    def _forget_starts(self, pool: PoolStatus | None, now: float) -> None:
        """A rank that was asked for is the pool's from its answer on: what the pool does not list has ended."""
        attaching = {rank.slot for rank in pool.ranks if not rank.ready} if pool else set(self._starting)
        self._starting = {
            slot: at for slot, at in self._starting.items() if slot in attaching and now - at < START_SECONDS_MAX
        }

    def _ask_hmm(self) -> HmmStatus | None:
        try:
            answer, _ = self._hmm.call(GetHmmStatus(), deadline_ms=CALL_MS)
        except (ElasticMoEError, ProtocolError):
            return None
        return answer if isinstance(answer, HmmStatus) else None

    def _ask_pool(self) -> PoolStatus | None:
        try:
            # At start the pool imports for seconds; loading must not wait for it.
            answer, events = self._pool.call(GetPool(), deadline_ms=CALL_MS if self._ever_served else STARTING_MS)
        except (ElasticMoEError, ProtocolError):
            return None
        for event in events:
            self._on_event(event.body)
        return answer if isinstance(answer, PoolStatus) else None

    def _take_events(self, wait_ms: int) -> None:
        try:
            received = self._pool.receive(wait_ms)
        except ProtocolError as error:
            log.warning("bad message", because=error.message)
            return
        if received is not None:
            self._on_event(received.body)

    def _on_event(self, event: ToScaler) -> None:
        if isinstance(event, RankReady):
            log.info("rank ready", rank=event.rank, attach_ms=event.attach_ms, build_ms=event.build_ms)
        elif isinstance(event, RankExited):
            self._starting.pop(event.slot, None)
            now = time.monotonic()
            self._exits.setdefault(event.slot, deque(maxlen=100)).append(now)
            # The first replacement starts at once: streams wait for it. Later ones wait longer, up to a limit.
            self._backoff_until = now + min(BACKOFF_S_MAX, BACKOFF_S * (2 ** (self._recent_exits(now) - 1) - 1))
            self._last_exit = event.reason
            log.warning("rank exited", rank=event.rank, exit_code=event.exit_code, reason=event.reason)
            self._journal("rank_exited", event.reason, rank=str(event.rank), exit_code=str(event.exit_code))

    def _recent_exits(self, now: float) -> int:
        """Of the seat whose ranks died most often in the window."""
        window_s = self._config.rank_restarts_window_s
        return max((sum(now - at < window_s for at in exits) for exits in self._exits.values()), default=0)

    def _first_layout(self) -> Layout:
        """Epoch 1, for an HMM that holds nothing. Raises ConfigError for too few devices."""
        wanted, there = self._config.replicas * self._config.tp, self._config.num_devices
        if there < wanted:
            raise ConfigError(
                f"{self._config.replicas} replicas of tp={self._config.tp} need {wanted} devices; there are {there}"
            )
        devices = [f"host:{i}" for i in range(wanted)]
        return initial_layout(self._spec.num_experts_by_layer, devices, tp=self._config.tp)

    def _show(self, decision: Decision, hmm: HmmStatus | None, pool: PoolStatus | None, fence: int) -> None:
        if decision.reason != self._last_reason:
            self._last_reason = decision.reason
            log.info(decision.reason, phase=decision.phase)
            self._journal("decision", decision.reason, phase=decision.phase)
        self._ever_served |= decision.phase == "serving"
        self.board.snapshot = Snapshot(
            decision.phase,
            decision.reason,
            decision.error,
            self._layout,
            hmm,
            pool,
            fence,
            self.board.snapshot.config,
        )

    def _journal(self, kind: str, reason: str, **facts: str) -> None:
        epoch = self._layout.epoch if self._layout else 0
        try:
            self._store.append_event(Event(kind, reason, epoch, self._identity, time.time(), facts))
        except Unavailable as error:
            log.warning("event not journaled", kind=kind, because=error.message)

    # ---- actions --------------------------------------------------------------------------------------------------

    def _act(self, action: Action, layout: Layout) -> None:
        try:
            if isinstance(action, Load):
                self._hmm.call(self._load_message(layout), deadline_ms=CALL_MS)
            elif isinstance(action, Start):
                self._start(action, layout)
            elif isinstance(action, Publish):
                self._hmm.call(SetMembership(layout.slots, action.running), deadline_ms=CALL_MS)
            elif isinstance(action, CommitLayout):
                self._store.put_layout(layout)
                self._committed_epoch = layout.epoch
        except ElasticMoEError as error:
            if error.code == Fenced.code:
                raise
            log.warning("action failed", action=type(action).__name__, code=error.code, because=error.message)
            self._take_events(TURN_MS * 4)

    def _load_message(self, layout: Layout) -> LoadModel:
        config = self._config
        return LoadModel(
            op_id=f"load-epoch-{layout.epoch}",
            model_path=str(Path(config.model).absolute()),
            dtype=self._spec.dtype,
            layout=layout,
            block_size=config.block_size,
            kv_bytes_max=config.kv_bytes,
            max_tokens=config.max_tokens_per_step,
            max_sequences=config.max_sequences,
            max_model_len=min(config.max_model_len, self._spec.max_positions),
        )

    def _start(self, action: Start, layout: Layout) -> None:
        seat = action.seat
        _, events = self._pool.call(
            StartRank(
                rank=seat.rank,
                slot=seat.slot,
                device=seat.device,
                incarnation=new_identity(f"rank-{seat.rank}"),
                epoch=layout.epoch,
                max_tokens=self._config.max_tokens_per_step,
                max_sequences=self._config.max_sequences,
                max_model_len=min(self._config.max_model_len, self._spec.max_positions),
            ),
            deadline_ms=CALL_MS,
        )
        self._starting[seat.slot] = time.monotonic()
        for event in events:
            self._on_event(event.body)
