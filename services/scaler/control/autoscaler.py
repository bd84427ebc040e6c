"""What the policy sees and does in the scaler's loop: windows come in, a load is shown to the reconciler when a router
has told something new, about once a second, its decisions are told, and its orders go to admission like an operator's.
The loop's thread.

Who is expected to tell of its load: the leader of each replica of the layout in force, by the pool's word, and each
router that has been heard; followers have no load of their own. A router that is silent leaves its share unknown for as
long as its connection lasts: it hangs. One whose process has ended is forgotten after FORGET_S, once another one
speaks, which has taken its place.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Annotated

import msgspec

from elasticmoe.common.capacity import sizes_of
from elasticmoe.common.clock import Clock
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.described import says
from elasticmoe.common.endpoints import ServerEnd
from elasticmoe.common.model_spec import ModelSpec
from elasticmoe.common.protocol.errors import DoesNotFit, ElasticMoEError
from elasticmoe.common.protocol.signals import RankWindow, RouterWindow, Signal
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.scaler.actions import CancelStuck, ScaleTo
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.control.admission import CancelOperation, Later, Order, Running, UnprocessableTarget
from elasticmoe.services.scaler.control.executor import Tell
from elasticmoe.services.scaler.control.losses import usable_devices
from elasticmoe.services.scaler.observation import Load
from elasticmoe.services.scaler.operation.operation import Request
from elasticmoe.services.scaler.planning.plan import Rates, Target
from elasticmoe.services.scaler.planning.planner import planned_from
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.facts import RefusedOrder
from elasticmoe.services.scaler.policy.figures import Signals, Throughput
from elasticmoe.services.scaler.policy.orders import told
from elasticmoe.services.scaler.policy.saturation import Saturation
from elasticmoe.services.scaler.policy.signals import Intake
from elasticmoe.services.scaler.policy.state import Decision, Evidence, PolicyState, Reason
from elasticmoe.services.scaler.policy.step_model import StepModels

log = get_logger("scaler")

TICK_S = 1.25  # between two turns of the policy, at the most: longer than a window and its way
HURRY_S = 0.3  # at the least, where a router's window has come
FORGET_S = 10.0  # a router that has gone, once another one is heard
DECISIONS_MAX = 200
TELL_AGAIN_S = (
    60.0  # where the load lies at a threshold, two decisions take turns, and would crowd out all other events
)
WINDOWS_MAX = 1_000  # taken in one turn
UNUSUAL_S = 2.0  # after an operation, windows still tell of steps beside it
ROUTERS_MAX = 64  # expected at once; windows of others are dropped until one is forgotten


class Decided(msgspec.Struct, frozen=True, kw_only=True):
    """What the policy decided, from when it decided so until it decided otherwise."""

    time_unix: Annotated[float, says("When, in seconds since 1970")]
    mode: Annotated[str, says("`advise`: it was told and not done; `act`: done")]
    reason: Annotated[Reason, says("Why, by its stable name")]
    replicas: Annotated[int, says("Replicas in force then")]
    target: Annotated[int | None, says("Replicas that there should be; null: as there are")]
    op_id: Annotated[str | None, says("Of the order that it gave, or would have given")]
    supersedes: Annotated[str | None, says("The operation that had to give way")]
    acts: Annotated[bool, says("Whether it was done")]
    evidence: Annotated[
        Evidence, says("What it rests on: now, in `GET /v1/policy`; when it was told, in `GET /v1/decisions`")
    ]


class Autoscaler:
    """`serve` opens the end at which windows arrive, and takes it from a scaler that was superseded; anew where that
    one took it back before it knew. `take` carries an order out as the admin surface's are, or raises its refusal.
    `count` counts a decision by its reason; `hear_experts` gets each rank's window."""

    def __init__(
        self,
        config: ScalerConfig,
        spec: ModelSpec,
        serve: Callable[[], ServerEnd[Signal]],
        policy: PolicyConfig,
        take: Callable[[Order | CancelOperation], object],
        tell: Tell,
        count: Callable[[str], None],
        hear_experts: Callable[[RankWindow], None],
        clock: Clock,
    ) -> None:
        self._config = config
        self._spec = spec
        self._serve = serve
        self._server: ServerEnd[Signal] | None = None
        self._look_at = 0.0  # whether it can still be found
        self._take = take
        self._tell = tell
        self._count = count
        self._hear_experts = hear_experts
        self._clock = clock
        self.policy = policy
        self._intake = Intake(policy)
        self._models = StepModels()
        # Since the policy's last turn, of somebody who was not expected then.
        self._early: deque[tuple[Signal, float]] = deque(maxlen=WINDOWS_MAX)
        self._routers: dict[str, float] = {}  # when each was heard last
        self._turned_at = -math.inf  # the policy's last turn
        self._has_news = False  # a router has told something since
        self._changing_at = -math.inf  # an operation was in progress last
        self._seen_at = -math.inf  # HMM and pool answered last
        self._cancel = ""  # this operation, which nobody has been told to yet
        self._order: ScaleTo | None = None  # given, and neither accepted nor refused yet
        self._accepted: str | None = None
        self._refused: RefusedOrder | None = None
        self.signals: Signals | None = None  # as of the policy's last turn
        self.throughput: Throughput | None = None  # the same
        self.saturation: Saturation | None = None  # the same
        self.decision: Decided | None = None  # the last one
        self.decided: deque[Decided] = deque(maxlen=DECISIONS_MAX)  # those that were told, newest first
        self._told_at: dict[tuple[Reason, int | None, str], float] = {}  # each, when it was told last

    def use(self, policy: PolicyConfig) -> None:
        """Follow another policy from now on. An order that waits, and that it might have given as well, goes on
        waiting."""
        self.policy = policy
        self._intake.configure(policy)
        order = self._order
        if policy.mode != "act" or (order and not policy.replicas_min <= order.replicas <= policy.replicas_max):
            self._order, self._cancel = None, ""

    # ---- what is seen ---------------------------------------------------------------------------------------------

    def observe(self, cluster: Cluster, lost: frozenset[str], *, is_changing: bool) -> Load | None:
        """The load, when the policy's next turn is due; takes what has come in any case. `lost`: devices that must not
        be used. `is_changing`: an operation is in progress."""
        now = self._clock.monotonic()
        self._receive(now)
        if is_changing:
            self._changing_at = now
        # By a clock of its own, a turn would see each window up to TICK_S late.
        due_at = self._turned_at + (HURRY_S if self._has_news else TICK_S)
        if now < due_at:
            return None
        self._turned_at, self._has_news = now, False
        if cluster.memory is None or not cluster.pools_answer:
            self._look_on(cluster, now)
            return None
        self._seen_at = now
        layout, facts, memory = planned_from(cluster)
        living = {slot: rank for slot, rank in cluster.ranks.items() if rank.ready}
        leaders = [seat for seat in layout.seats if seat.rank.tp == 0]
        ranks = {seat.rank: living[seat.slot].incarnation if seat.slot in living else "" for seat in leaders}
        self._intake.expect(self._expected_routers(now), ranks, layout.epoch, now)
        for window, arrived_at in self._early:
            self._intake.take(window, arrived_at)
        self._early.clear()
        steps = self._intake.take_steps()
        if now - self._changing_at >= UNUSUAL_S:  # copies and moves make steps longer than they will be
            self._models.learn(layout.dp, steps)
        self.signals, self.throughput = self._intake.signals(now), self._intake.throughput(now)
        return Load(
            config=self.policy,
            signals=self.signals,
            steps=self._models.known,
            sizes=sizes_of(self._spec, facts.granularity),
            memory=memory,
            devices=usable_devices(cluster, lost),
            rates=Rates(copy_bytes_per_s=float(self._config.copy_limit)),
            kv_handle_tokens=facts.kv.blocks_per_handle * self._config.block_size,
            step_tokens_max=self._config.max_tokens_per_step,
            shares_cores=self._config.shares_cores,
            cores=cluster.cores,
            threads_max=cluster.threads_max,
            accepted=self._accepted,
            refused=self._refused,
        )

    def _look_on(self, cluster: Cluster, now: float) -> None:
        """While HMM or pool is away nothing can be decided; figures go on all the same, and after a while what was
        decided before is no longer what stands."""
        self.signals, self.throughput = self._intake.signals(now), self._intake.throughput(now)
        is_long = now - self._seen_at >= self.policy.unknown_after_s
        if is_long and self.decision is not None and self.policy.mode != "off":
            evidence = Evidence(silent=self.signals.silent)
            nothing = Decision(target=None, reason=Reason.RECOVERING, evidence=evidence, state=PolicyState())
            self.note(nothing, cluster.in_force.layout.dp)

    def _receive(self, now: float) -> None:
        if self._server is not None and now >= self._look_at:
            self._look_at = now + TICK_S
            if not self._server.has_path():
                log.warning("another scaler took the windows, and this one takes them back")
                self._server.close()
                self._server = None
        if self._server is None:
            self._server = self._serve()
        for _ in range(WINDOWS_MAX):
            received = self._server.receive()
            if received is None:
                return
            window = received[1].body
            if isinstance(window, RankWindow):
                self._hear_experts(window)
                if window.rank.tp:  # a follower: it tells of nothing else
                    continue
            if not self._intake.take(window, now):
                self._early.append((window, now))
            is_known = isinstance(window, RouterWindow) and window.router in self._routers
            if isinstance(window, RouterWindow) and (is_known or len(self._routers) < ROUTERS_MAX):
                self._routers[window.router] = now
                self._has_news = True

    def _expected_routers(self, now: float) -> set[str]:
        newest = max(self._routers.values(), default=now)
        if now - newest < FORGET_S:  # else none of them is heard, and all their shares are unknown
            gone = [name for name, at in self._routers.items() if now - at >= FORGET_S and not self._is_there(name)]
            for name in gone:
                del self._routers[name]
        return set(self._routers)

    def _is_there(self, router: str) -> bool:
        return self._server is not None and self._server.is_connected(router.encode())

    # ---- what is decided ------------------------------------------------------------------------------------------

    def note(self, decision: Decision, replicas: int) -> None:
        """Keep a decision that is not the one before, or that is done; and tell it, unless the same one, which was not
        done, was told in the last TELL_AGAIN_S."""
        self.saturation = decision.evidence.raw
        before, mode = self.decision, self.policy.mode
        key = (decision.reason, decision.target, mode)
        is_same = before is not None and (before.reason, before.target, before.mode) == key
        if before is not None and is_same and not decision.acts:
            self.decision = msgspec.structs.replace(before, replicas=replicas, evidence=decision.evidence)
            return
        decided = Decided(
            time_unix=self._clock.time(),
            mode=mode,
            reason=decision.reason,
            replicas=replicas,
            target=decision.target,
            op_id=decision.op_id,
            supersedes=decision.supersedes,
            acts=decision.acts,
            evidence=decision.evidence,
        )
        self.decision = decided
        self._count(decision.reason.value)
        now = self._clock.monotonic()
        if not decision.acts and now - self._told_at.get(key, -math.inf) < TELL_AGAIN_S:
            return
        self._told_at[key] = now
        self.decided.appendleft(decided)
        target = decision.target if decision.target is not None else replicas
        facts = {"mode": mode, "replicas": str(replicas), "target": str(target), "acts": str(decision.acts).lower()}
        if decision.op_id is not None:
            facts["op_id"] = decision.op_id
        evidence = msgspec.to_builtins(decision.evidence)
        facts["evidence"] = msgspec.json.encode(evidence).decode()
        self._tell("policy", decision.reason.value, **facts)

    def wait_for(self, op_id: str | None) -> None:
        """Drop the order that waits, unless it is this one: the policy waits for no other any more."""
        if self._order is not None and self._order.op_id != op_id:
            self._order, self._cancel = None, ""

    def scale(self, action: ScaleTo) -> None:
        """Give an order; `turn` goes on with it until it is accepted or refused."""
        self._order, self._cancel = action, action.supersedes
        self.turn()

    def cancel(self, action: CancelStuck) -> None:
        """Cancel an operation that does not come to its commit."""
        self._cancel = action.op_id
        self.turn()

    def turn(self) -> None:
        """Go on with what has found no answer yet: an operation that is to give way, and the order that it is to give
        way to, which has to wait for its end."""
        self._try_cancel()
        action = self._order
        if action is None:
            return
        request = Request(
            replicas=action.replicas, reason=told(Reason(action.reason)), deadline_s=self._config.operation_deadline_s
        )
        order = Order(action.op_id, request, Target(replicas=action.replicas), policy_order=action.number)
        try:
            self._take(order)
            self._accepted = action.op_id
        except Later:
            return
        except Running as running:
            if running.op_id == action.supersedes:
                return
            # What somebody else has begun leads to another size than the one that was decided by.
            log.info("the policy's order is dropped", operation_id=action.op_id, because=running.message)
        except ElasticMoEError as error:
            self._refused = RefusedOrder(action.op_id, is_of_size=isinstance(error, DoesNotFit | UnprocessableTarget))
            facts = {"operation_id": action.op_id, "code": error.code, "because": error.message}
            log.warning("the policy's order is refused", **facts)
            self._tell("policy_refused", error.message, op_id=action.op_id, code=error.code)
        self._order = None

    def _try_cancel(self) -> None:
        """Whoever refuses has seen the operation's end or its commit; `Later`: its journal is behind."""
        if not self._cancel:
            return
        try:
            self._take(CancelOperation(self._cancel, by="policy"))
        except Later:
            return
        except ElasticMoEError as error:
            log.info("not cancelled", operation_id=self._cancel, because=error.message)
        self._cancel = ""

    def close(self) -> None:
        """Receive nothing more. Idempotent."""
        if self._server is not None:
            self._server.close()
