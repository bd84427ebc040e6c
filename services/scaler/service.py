"""The scaler's loop: observe, decide, act. One thread; the admin listener, the lease and the journal have their own."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

from elasticmoe.common.capacity import sizes_of
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.layout import Layout
from elasticmoe.common.model_spec import ModelSpec
from elasticmoe.common.protocol.errors import Unavailable, Unready
from elasticmoe.common.protocol.scaler import RankExited, RankReady, ToScaler
from elasticmoe.common.protocol.signals import CODEC as SIGNALS
from elasticmoe.common.stop_signals import StopSignals
from elasticmoe.common.store import Event, Writer
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.scaler.actions import LeaveOut
from elasticmoe.services.scaler.api.event_stream import EventStream
from elasticmoe.services.scaler.api.experts import ExpertLoads
from elasticmoe.services.scaler.api.series import Series
from elasticmoe.services.scaler.api.snapshot import StatusCache, StatusSnapshot
from elasticmoe.services.scaler.cluster import Cluster, in_force
from elasticmoe.services.scaler.control.admission import (
    ORDERS_MAX,
    Accepted,
    Admission,
    CancelOperation,
    Command,
    CommandAnswer,
    CommandQueue,
    Later,
    Order,
    SetPolicy,
)
from elasticmoe.services.scaler.control.autoscaler import Autoscaler
from elasticmoe.services.scaler.control.autoscaling import remembered
from elasticmoe.services.scaler.control.executor import ENDED_MAX, Executor
from elasticmoe.services.scaler.control.links import Links
from elasticmoe.services.scaler.control.losses import lost_devices
from elasticmoe.services.scaler.control.members import begun
from elasticmoe.services.scaler.control.operation_spans import OperationSpans
from elasticmoe.services.scaler.control.state import State
from elasticmoe.services.scaler.metrics import Meters
from elasticmoe.services.scaler.observation import Observation
from elasticmoe.services.scaler.parts import ScalerParts
from elasticmoe.services.scaler.policy.record import PolicyRecord, changed, policy_of
from elasticmoe.services.scaler.store.journal import Journal
from elasticmoe.services.scaler.store.lease import Lease
from elasticmoe.services.scaler.store.recall import Recall
from elasticmoe.services.scaler.store.resume import Beginning

if TYPE_CHECKING:
    from elasticmoe.common.tracing.spans import Spans

log = get_logger("scaler")

TURN_S = 0.01  # while something is to be brought about
IDLE_TURN_S = 0.05
# While nobody computes. A rank that is stopped then is seen to stand, and looked at more often from there.
QUIET_TURN_S = 0.45
AFTER_FAILURE_S = 0.2
BACKOFF_S = 0.1  # doubles with each exit of a seat in the window
BACKOFF_S_MAX = 5.0


class Scaler:
    """Owns the layout. Everything in it belongs to the loop's thread; `status_cache`, `commands`, `events`,
    `series`, `experts` and `meters` are shared with the admin listener.

    `run` lets threads take the turns of lease and journal, and is `turn` and `wait` in turns until a signal, then
    `close`. What drives it otherwise does the same, and takes the turns of lease and journal as well.
    """

    def __init__(self, config: ScalerConfig, spec: ModelSpec, parts: ScalerParts) -> None:
        """Raises ConfigError for devices that make no replicas."""
        self._config = config
        self._identity = parts.identity
        self._clock = parts.clock
        self._wake = parts.poller.wake
        self._reserve = parts.reserve
        self._spec = spec
        self._links = Links(config, spec, parts, self._on_event)
        self.lease = Lease(parts.store.another("scaler-lease"), parts.identity, config.lease_ms, parts.fence)
        self.meters = Meters()
        self.commands = CommandQueue(parts.poller.wake, parts.clock)
        self.events = EventStream()
        self.series, self.experts = Series(parts.identity), ExpertLoads()
        self._recall = Recall(config, spec, parts.store, parts.epochs, parts.new_identity)
        self.journal = Journal(
            parts.store.another("scaler-journal"),
            parts.identity,
            parts.epochs.note,
            self.lease.lose,
            parts.poller.wake,
            parts.reserve,
            parts.clock,
        )
        state = State(stall_s=config.rank_stall_s)
        self._executor = Executor(config, self._links, self.journal, self.meters, self._tell, state, parts.clock)
        self._executor.leave_out = self._leave_out
        room = (self.lease.check_room, self.journal.check_room)
        self._admission = Admission(config, spec, self._executor, room, self._tell, parts.clock, parts.new_identity)
        self._autoscaler = Autoscaler(
            config,
            spec,
            lambda: parts.transport.take_over("signals", parts.identity, SIGNALS),
            policy_of(config),
            self._take,
            self._tell,
            self.meters.decision,
            self.experts.take,
            parts.clock,
        )
        self._executor.scale, self._executor.cancel = self._autoscaler.scale, self._autoscaler.cancel
        self._policy: PolicyRecord | None = None
        self._fence = 0  # the epoch that came with the lease
        self._layout: Layout | None = None
        self._beginning: Beginning | None = None
        self._is_writing = self._is_settled = self._is_quiet = False
        self._cluster: Cluster | None = None
        self._exits: dict[int, deque[float]] = {}  # slot -> when its last ranks ended
        self._backoff_until = 0.0
        self._last_exit = ""
        self._stopping = False
        self._taken: deque[tuple[SetPolicy, PolicyRecord]] = deque(maxlen=ORDERS_MAX)  # whose answer may wait
        settings = {k: v for k, v in msgspec.structs.asdict(config).items() if k != "store_url"}
        self.status_cache = StatusCache(StatusSnapshot("starting", "", None, None, None, 0, settings))

    def stop(self) -> None:
        """Let `run` return."""
        self._stopping = True
        self._wake()

    def trace(self, spans: Spans | None) -> None:
        """Let operations be written as `spans`, where there are any."""
        self._executor.spans = OperationSpans(spans, self._clock) if spans is not None else None

    def run(self) -> None:
        """Serve until a signal comes. Raises Fenced when another scaler has taken over."""
        signals = StopSignals(self.stop)
        signals.listen()
        try:
            self.journal.start()
            self.lease.start()
            while not self._stopping:
                self.wait(self.turn())
        finally:
            self.close()
            signals.close()

    def close(self) -> None:
        """Refuse what waits, write what is left to the store, and let another scaler have the lease."""
        self.lease.why_not = Unready("this scaler ends, and another one takes its place")
        self._refuse_orders()
        self.events.close()
        self._autoscaler.close()
        self._links.close()
        self.journal.close()
        self.lease.release()

    def wait(self, wait_s: float) -> None:
        """Sleep until something comes, at most so long, and look at it. Answers do not wake a quiet loop."""
        self._links.wait(wait_s, is_quiet=self._is_quiet)

    # ---- before the first turn ------------------------------------------------------------------------------------

    def _acquire(self) -> bool:
        """Ask for the lease, and answer orders with the reason where there is none."""
        fence = self.lease.attempt()
        if isinstance(fence, str):
            self._refuse_orders()
            self._wait_because(f"waiting for the lease: {fence}")
            if self.lease.why_not.code == "storage_full":
                self._reserve.give_up()  # what is reserved for an operation is of no use to it without a scaler
            return False
        self._fence = self.events.fence = fence
        self._links.act_under(fence)
        return True

    def _wait_because(self, reason: str) -> None:
        self.status_cache.snapshot = msgspec.structs.replace(self.status_cache.snapshot, reason=reason)

    def _refuse_orders(self) -> None:
        def refuse(_: Command) -> CommandAnswer:
            raise self.lease.why_not

        self.commands.serve(refuse)

    def _begin(self) -> Beginning | None:
        """Take over what the store knows; None where it does not answer now."""
        try:
            recalled = self._recall.read(Writer(self._identity, self._fence))
        except Unavailable as error:
            log.warning("what earlier runs have left cannot be read", because=error.message)
            self.lease.why_not = error
            self._wait_because(f"what earlier runs have left cannot be read: {error.message}")
            return None
        self._executor.resume(recalled.operation, recalled.ended[:ENDED_MAX])
        self.status_cache.snapshot = msgspec.structs.replace(
            self.status_cache.snapshot, resumed=recalled.resumed, instance=recalled.instance
        )
        self._beginning = recalled.beginning
        self._use_policy(recalled.policy)
        newest = [] if recalled.operation is None else [recalled.operation]
        now, now_unix = self._clock.monotonic(), self._clock.time()
        known = remembered([*newest, *recalled.ended], recalled.policy.config, now, now_unix)
        status = begun(now, is_resumed=recalled.beginning.is_resumed)
        self._executor.state = msgspec.structs.replace(self._executor.state, status=status, autoscaling=known)
        if recalled.policy_damage:
            self._tell("policy_unreadable", recalled.policy_damage, mode=recalled.policy.config.mode)
        known_policy = None if recalled.policy_damage else recalled.policy
        self.journal.adopt_kept(known_policy, recalled.instance, recalled.served)
        return recalled.beginning

    # ---- one turn -------------------------------------------------------------------------------------------------

    def turn(self) -> float:
        """Observe, decide, act; for how many seconds to `wait` at most before the next turn. Blocks for answers of HMM
        and pool only, which are asked by links. Raises Fenced when another scaler has taken over."""
        self.lease.check()
        if not self._fence and not self._acquire():
            return self._config.lease_ms / 10e3
        failpoint("scaler.turn")
        beginning = self._beginning or self._begin()
        if beginning is None:
            self._refuse_orders()
            return AFTER_FAILURE_S
        executor = self._executor
        hosts = self._links.ask(is_starting=not executor.state.ever_served, is_quiet=self._is_quiet)
        cluster = self._cluster = Cluster(hosts, in_force(hosts, self._layout, beginning.layout))
        self._go_on_writing(beginning, cluster)
        if cluster.phase not in (None, "loading"):
            self._layout = cluster.in_force.layout
        self.commands.serve(self._handle)
        self._autoscaler.turn()
        seen = self._observe(cluster)
        actions = executor.decide(seen)
        decision = executor.state.autoscaling.decision
        if seen.load is not None and decision is not None:
            order = executor.state.autoscaling.policy.order
            self._autoscaler.wait_for(order.op_id if order is not None else None)
            self._autoscaler.note(decision, cluster.in_force.layout.dp)
        self._show(cluster)
        is_done = executor.execute(actions)
        is_busy = executor.operation is not None or executor.state.status.phase == "degraded" or bool(actions)
        self._is_quiet = not is_busy and executor.state.is_quiet
        wait_s = TURN_S if is_busy else QUIET_TURN_S if self._is_quiet else IDLE_TURN_S
        return wait_s if is_done else AFTER_FAILURE_S

    def _observe(self, cluster: Cluster) -> Observation:
        now = self._clock.monotonic()
        return msgspec.structs.replace(
            self._executor.observe(cluster, is_quiet=self._is_quiet),
            restarts_left=self._config.rank_restarts_max - self._recent_exits(now) + 1,
            is_backing_off=now < self._backoff_until,
            last_exit=self._last_exit,
            load_refused=self._beginning.refusal if self._beginning is not None else None,
            is_resumed=self._beginning is not None and self._beginning.is_resumed,
            load=self._autoscaler.observe(cluster, self._lost(), is_changing=self._executor.operation is not None),
        )

    def _on_event(self, event: ToScaler) -> None:
        if isinstance(event, RankReady):
            log.info("rank ready", rank=event.rank, attach_ms=event.attach_ms, build_ms=event.build_ms)
        elif isinstance(event, RankExited):
            facts = {"rank": str(event.rank)}
            if event.exit_code is not None:
                facts["exit_code"] = str(event.exit_code)
            is_member = self._layout is None or event.slot in self._layout.slots
            if self._executor.on_exit(event) or not is_member:
                log.info("rank ended that joins or leaves", because=event.reason, **facts)
                self._tell("rank_ended", event.reason, **facts)
                return
            now = self._clock.monotonic()
            self._exits.setdefault(event.slot, deque(maxlen=100)).append(now)
            # The first replacement starts at once: streams wait for it. Later ones wait longer, up to a limit.
            self._backoff_until = now + backoff_s(self._recent_exits(now))
            self._last_exit = event.reason
            log.warning("rank exited", because=event.reason, **facts)
            self._tell("rank_exited", event.reason, **facts)

    def _recent_exits(self, now: float) -> int:
        """Of the seat whose ranks died most often in the window, of those that are to be filled again."""
        committed = self._cluster.in_force.committed if self._cluster is not None else None
        window_s, lost = self._config.rank_restarts_window_s, self._executor.state.lost_slots(committed)
        slots = set(self._layout.slots if self._layout is not None else self._exits) - lost
        return max((sum(now - at < window_s for at in self._exits.get(slot, ())) for slot in slots), default=0)

    def _go_on_writing(self, beginning: Beginning, cluster: Cluster) -> None:
        """Write to the store, but over nothing that is refused and may yet be resumed; and once the layout to begin
        with has been written there, what was to be dropped has been."""
        if not self._is_writing and (beginning.refusal is None or cluster.in_force.committed):
            self.journal.act_under(self._fence)
            self._is_writing = True
        if not self._is_settled and self.journal.announced_epoch:
            self._recall.settled()
            self._is_settled = True

    def _show(self, cluster: Cluster) -> None:
        status = self._executor.state.status
        self.status_cache.snapshot = StatusSnapshot(
            status.phase,
            status.reason,
            status.error,
            self._layout,
            cluster,
            self._fence,
            self.status_cache.snapshot.config,
            self._executor.operation,
            tuple(self._executor.ended),
            self._executor.loads_of(cluster),
            self.status_cache.snapshot.resumed,
            self.status_cache.snapshot.instance,
            self._policy,
            tuple(self._autoscaler.decided),
            self._autoscaler.signals,
            self._autoscaler.saturation,
            self._autoscaler.decision,
            self._autoscaler.throughput,
            sizes_of(self._spec, cluster.memory.granularity) if cluster.memory is not None else None,
        )
        self.series.note(self.status_cache.snapshot, self._clock.monotonic(), self._clock.time())

    def _tell(self, kind: str, reason: str, /, **facts: str) -> None:
        """Journal an event, and show it to those who listen."""
        epoch = self._layout.epoch if self._layout else 0
        event = Event(kind, reason, epoch, self._identity, self._clock.time(), facts)
        self.journal.event(event)
        self.events.publish(event)

    # ---- orders ---------------------------------------------------------------------------------------------------

    def _handle(self, order: Command) -> CommandAnswer:
        """Carry one order of the admin surface out, or raise its refusal. The status shows it before the
        answer goes."""
        if isinstance(order, SetPolicy):
            return self._set_policy(order)
        accepted = self._take(order)
        self.status_cache.snapshot = msgspec.structs.replace(
            self.status_cache.snapshot, operation=self._executor.operation
        )
        return accepted

    def _take(self, order: Order | CancelOperation) -> Accepted:
        assert self._cluster is not None, "orders are served once it was seen"
        return self._admission.take(order, self._cluster, ever_served=self._executor.state.ever_served)

    def _leave_out(self, action: LeaveOut) -> None:
        assert self._cluster is not None, "that was decided by what was seen"
        self._admission.leave_out(action, self._cluster)

    # ---- the policy -----------------------------------------------------------------------------------------------

    def _set_policy(self, order: SetPolicy) -> PolicyRecord:
        """Let another policy be in force, and answer once the store has it: a restart would drop it without a word.
        Raises Conflict `policy_changed`, Unavailable while it could not be kept, and Later."""
        assert self._policy is not None, "orders are served once the journal has been read"
        policy = next((policy for taken, policy in self._taken if taken is order), None)
        if policy is None:
            policy = changed(self._policy, order.version, order.config)
            if not self._is_writing:
                raise Unready("what the store holds may yet be resumed, and nothing is written over it")
            if self.journal.is_kept(policy):
                return policy
            self.lease.check_room()
            self.journal.check_takes()
            self.journal.keep(policy)
            if policy is not self._policy:
                self._tell("policy_set", f"version {policy.version}", mode=policy.config.mode)
                self._use_policy(policy)
            self._taken.append((order, policy))
        if not self.journal.is_kept(policy):
            text = f"version {policy.version} of the policy is in force, and the store has not taken it yet"
            raise Later(Unavailable(text, code="store_unavailable"))
        return policy

    def _use_policy(self, policy: PolicyRecord) -> None:
        self._policy = policy
        self._autoscaler.use(policy.config)
        self.status_cache.snapshot = msgspec.structs.replace(self.status_cache.snapshot, policy=policy)

    def _lost(self) -> frozenset[str]:
        """Devices that have been lost and have not come back."""
        return frozenset(lost_devices(self._executor.operation, self._executor.ended))


def backoff_s(num_exits: int) -> float:
    """How long the next start waits in seconds, after so many exits of a seat in the window."""
    return min(BACKOFF_S_MAX, BACKOFF_S * (2.0 ** max(0, num_exits - 1) - 1.0))
