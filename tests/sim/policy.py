"""The policy in act mode: a load that rises and falls, bounds that change, and what its orders must not be.

What it decides by is the product's own. Checked is what holds of any policy that is sound, whatever its thresholds: the
bounds, one order at a time, nothing taken away while somebody is silent, and an end that it is content with.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.layout import Layout
from elasticmoe.common.protocol.signals import RankWindow, Signal
from elasticmoe.services.scaler.actions import CancelStuck, ScaleTo
from elasticmoe.services.scaler.control.admission import SetPolicy
from elasticmoe.services.scaler.control.losses import lost_devices
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.record import PolicyRecord, policy_of
from elasticmoe.services.scaler.policy.state import Reason
from tests.sim.heap import Faults

if TYPE_CHECKING:
    from tests.sim.scaler import Scaler
    from tests.sim.world import World

SHARE = 0.2  # of the seeds
SETTLE_S_MAX = 120.0  # from the last fault, and the end of the load, to the size that the policy wants
SLACK_S = 1.5  # between two turns of the policy, and of a busy machine
# It is on its way, or waits for somebody: with one of these, the present size is not what it wants.
PASSING = frozenset(
    {Reason.OPERATION, Reason.AWAITING, Reason.RECOVERING, Reason.UNKNOWN, Reason.BLIND, Reason.AFTER_REFUSAL}
)
# Of an idle deployment whose policy waits for nothing longer than seconds: it wants no other size, now or later.
FINAL = frozenset({Reason.AT_MIN, Reason.AT_MAX, Reason.NOT_WORTH, Reason.NO_PLAN, Reason.KV_WOULD_NOT_FIT})


def acts(seed: int) -> bool:
    """Whether the policy acts in a seed."""
    return random.Random(f"acts {seed}").random() < SHARE


def _layout(scaler: Scaler) -> Layout:
    """In force, as it sees it."""
    cluster = scaler.service._cluster
    assert cluster is not None
    return cluster.in_force.layout


class Begun(NamedTuple):
    """An operation of the policy. `losses`: of the store, by then; `by`: the scaler that began it."""

    op_id: str
    at: float
    change: int
    by: Scaler
    losses: int


class Policies:
    """Of one seed, drawn apart, so that all else of it stays the same. `settings`: of its scalers."""

    def __init__(self, world: World, seed: int, settings: ScalerConfig) -> None:
        self._world = world
        self._rng = rng = random.Random(f"policy {seed}")
        self.acts = acts(seed)
        self.settings = settings
        self._given: dict[str, ScaleTo] = {}
        self._begun: dict[str, Begun] = {}
        self._heard: dict[tuple[Scaler, str], float] = {}
        self._healed_at: float | None = None
        # Of scalers, each after an operation of the policy has begun: the next one has to know of it.
        self._num_kills = 0
        if not self.acts:
            return
        least, most = rng.choice(((1, 2), (1, 3), (1, 4), (1, 4), (2, 4), (3, 4)))
        self.settings = msgspec.structs.replace(
            settings,
            policy="act",
            ttft_s=rng.choice((1.0, 3.0)),
            itl_s=rng.choice((0.6, 1.5)),
            replicas_min=least,
            replicas_max=most,
        )
        self._quick = self._draw(least, most)
        world.store.data["policy"] = PolicyRecord(1, self._quick, policy_of(self.settings))

    def _draw(self, least: int, most: int) -> PolicyConfig:
        """One that waits for seconds where the default waits for minutes."""
        rng, known = self._rng, policy_of(self.settings)
        hold_s = rng.choice((1.0, 3.0))
        return msgspec.structs.replace(
            known,
            replicas_min=least,
            replicas_max=most,
            hold_s=hold_s,
            hold_max_s=4 * hold_s,
            down_over_s=rng.choice((1.0, 4.0)),
            flap_s=2 * hold_s,
            fall_s=2.0,
            settle_s=1.0,
            horizon_s=5.0,
            unknown_after_s=rng.choice((3.0, 5.0)),
            blind_after_s=rng.choice((6.0, 30.0)),
            operations_max=rng.choice((2, 2, 8)),
            operations_over_s=rng.choice((15.0, 45.0)),
            price_factor=0.1,
            accept_s=rng.choice((1.0, 5.0)),
            stuck_s=rng.choice((8.0, 20.0)),
            loss_hold_s=rng.choice((5.0, 20.0)),
        )

    def draw(self, span_s: float) -> None:
        """Bursts of requests, also after the last fault, and maybe other bounds."""
        rng, world = self._rng, self._world
        if not self.acts:
            return
        number = 0
        for _ in range(rng.choice((1, 2, 2))):
            begin, length = world.sim.now + span_s * rng.random(), rng.uniform(1.0, 4.0)
            for _ in range(rng.randint(4, 10)):
                prompt = tuple(rng.randrange(250) for _ in range(rng.randint(1, 16)))
                request = f"b{number}", prompt, rng.randint(4, 27), 60.0
                world.sim.push(begin + length * rng.random(), None, 0, world.router.open, request)
                number += 1
        if rng.random() < 0.3:
            world.sim.push(world.sim.now + span_s * rng.random(), None, 0, self._change, ())
        draw = rng.random()
        if draw < 0.3:
            world.sim.faults["signals"] = Faults(loss=rng.choice((0.0, 0.5)), doubled=0.5, delay_max=8.0, slow=0.5)
        elif draw < 0.7:
            world.sim.push(world.sim.now + span_s * rng.random() / 2, None, 0, self._silence, ())
        self._num_kills = rng.choice((0, 0, 1, 2))

    def _silence(self) -> None:
        """Of all, or of somebody, until the last fault is over."""
        world = self._world
        ranks = [rank.address for rank in world.ranks.values()]
        of = self._rng.choice(
            ["signals", f"signals of {world.router.identity}", *(f"signals of {one}" for one in ranks)]
        )
        if not world.is_healed:
            world.sim.note(f"lost from now on: {of}")
            world.sim.faults[of] = Faults(loss=1.0)

    def _change(self) -> None:
        """An operator sets other bounds; who is not served, or comes too late, leaves it at that."""
        least = self._rng.randint(1, 3)
        most = self._rng.randint(least, 4)
        for scaler in self._world.scalers:
            record = scaler.service._policy
            if scaler.is_acting and record is not None:
                bounds = {"replicas_min": least, "replicas_max": most}
                self._world.sim.note(f"policy: {bounds}")
                scaler.service.commands.put(SetPolicy(record.version, msgspec.structs.replace(record.config, **bounds)))

    # ---- what must hold

    def watch(self, scaler: Scaler) -> None:
        """Look at each order of a scaler's policy before it is given."""
        executor = scaler.service._executor
        scale, cancel = executor.scale, executor.cancel

        def checked(action: ScaleTo) -> None:
            self._check_order(scaler, action)
            scale(action)

        def cancel_checked(action: CancelStuck) -> None:
            self._check_mode(scaler)
            cancel(action)

        executor.scale, executor.cancel = checked, cancel_checked

    def hear(self, scaler: Scaler, window: Signal) -> None:
        """A window has come to a scaler."""
        sender = window.incarnation if isinstance(window, RankWindow) else "router"
        self._heard[scaler, sender] = self._world.sim.now

    def _check_mode(self, scaler: Scaler) -> PolicyConfig:
        record = scaler.service._policy
        self._world.expect(record is not None and record.config.mode == "act", "an order by a policy that only advises")
        assert record is not None
        return record.config

    def _check_order(self, scaler: Scaler, action: ScaleTo) -> None:
        expect, config = self._world.expect, self._check_mode(scaler)
        state, text = scaler.service._executor.state, f"the policy orders {action.replicas} ({action.reason})"
        self._world.sim.note(f"{scaler.name}: {text}, {action.op_id}")
        is_repeated = action.op_id in self._given
        if is_repeated:
            expect(action == msgspec.structs.replace(self._given[action.op_id], reason=action.reason), f"{text} anew")
        else:
            waits = scaler.service._autoscaler._order
            expect(waits is None, f"{text}, and its last order has no answer")
        self._given.setdefault(action.op_id, action)
        expect(state.status.phase == "serving", f"{text} while it is {state.status.phase}")
        width, operation = _layout(scaler).dp, state.operation
        if operation is not None:
            gives_way = operation.op_id == action.supersedes and operation.kind == "scale_down"
            is_early = operation.leg == 0 and operation.phase in ("plan", "prepare")
            expect(gives_way and is_early, f"{text} while {operation.op_id} is in progress: {operation.phase}")
        else:
            expect(is_repeated or action.replicas != width, f"{text}, and that is the size")
        if action.replicas >= width:
            expect(action.replicas <= config.replicas_max, f"{text}, beyond {config.replicas_max}")
        else:
            expect(action.replicas >= config.replicas_min, f"{text}, below {config.replicas_min}")
            if not is_repeated:
                self._check_heard(scaler, config, text)
        if not is_repeated:
            self._check_pace(scaler, config, action.replicas - width, text)

    def _check_heard(self, scaler: Scaler, config: PolicyConfig, text: str) -> None:
        """Whoever has a share in the load has told of it lately."""
        since = self._world.sim.now - config.unknown_after_s - SLACK_S
        layout = _layout(scaler)
        ranks = {slot: rank.seat.incarnation for slot, rank in self._world.pool.ranks.items()}
        leaders = (seat.slot for seat in layout.seats if seat.rank.tp == 0)
        for sender in ("router", *(ranks[slot] for slot in leaders if slot in ranks)):
            is_heard = self._heard.get((scaler, sender), -1.0) > since
            self._world.expect(is_heard, f"{text}, and {sender} is silent")

    def _check_pace(self, scaler: Scaler, config: PolicyConfig, change: int, text: str) -> None:
        """Neither too many operations, nor a shrink too soon after a growth, whichever scaler ordered them: but for
        those that the store never had, or has lost."""
        store, now = self._world.store, self._world.sim.now
        kept = {
            operation.op_id for operation in (store.data.get("operation"), *store.data.get("ended", ())) if operation
        }
        known = [one for one in self._begun.values() if one.by is scaler or one.op_id in kept]
        known = [one for one in known if one.losses == store.num_losses]
        recent = [one for one in known if now - one.at < config.operations_over_s - SLACK_S]
        self._world.expect(len(recent) < config.operations_max, f"{text} after {len(recent)} operations")
        least, most = config.replicas_min, config.replicas_max
        is_within = least <= _layout(scaler).dp <= most
        for one in known if change < 0 and is_within else ():
            is_held = one.change <= 0 or now - one.at >= config.hold_s - 0.1
            self._world.expect(is_held, f"{text} {now - one.at:.1f} s after a growth")

    def look(self, scaler: Scaler) -> None:
        """After a turn of a scaler: which operations of the policy have begun."""
        executor = scaler.service._executor
        newest = (executor.operation, *executor.ended[:2])
        for operation in newest if self.acts and scaler.is_acting else ():
            if operation is not None and operation.policy_order is not None and operation.op_id not in self._begun:
                self._begin(scaler, operation)

    def _begin(self, scaler: Scaler, operation: Operation) -> None:
        expect, planned, order = self._world.expect, operation.planned, self._given.get(operation.op_id)
        assert planned is not None
        text = f"{operation.op_id} from {planned.replicas_before} to {planned.replicas_after}"
        expect(order is not None and planned.replicas_after == order.replicas, f"{text}: nobody has decided that")
        assert order is not None
        change = planned.replicas_after - planned.replicas_before
        expect(change != 0 or bool(order.supersedes), f"{text}: it was done already")
        begun = Begun(operation.op_id, self._world.sim.now, change, scaler, self._world.store.num_losses)
        self._begun[operation.op_id] = begun
        if self._num_kills and not self._world.is_healed:
            self._num_kills -= 1
            at, down_s = self._world.sim.now + self._rng.uniform(0.0, 3.0), self._rng.uniform(0.1, 1.0)
            self._world.sim.push(at, scaler, scaler.life, self._kill, (scaler, down_s))

    def _kill(self, scaler: Scaler, down_s: float) -> None:
        if not self._world.is_healed:
            scaler.crash(down_s)

    # ---- the end

    def unrest(self) -> str:
        """Why the size is not what the policy wants; empty when it is. All else is at rest."""
        if not self.acts:
            return ""
        world, (scaler,) = self._world, [scaler for scaler in self._world.scalers if scaler.is_acting][:1]
        if self._healed_at is None:
            self._healed_at = world.sim.now
        decision, record = scaler.service._autoscaler.decision, scaler.service._policy
        assert record is not None
        text = "nothing is decided" if decision is None else f"the policy says {decision.reason} at {decision.replicas}"
        waited = world.sim.now - self._healed_at
        world.expect(waited < SETTLE_S_MAX, f"{text} {waited:.0f} s after the last request, with {record.config.mode}")
        if decision is None or decision.target is not None:
            return text
        config, width = record.config, world.hmm.loaded.layout.dp if world.hmm.loaded else 0
        is_quick = config.hold_s == self._quick.hold_s
        if decision.reason not in FINAL if is_quick else decision.reason in PASSING:
            return text
        known = lost_devices(world.store.data.get("operation"), world.store.data.get("ended", []))
        usable = len(world.hmm.memories) - len(world.losses.gone | known)  # with a device goes its replica
        least = min(config.replicas_min, usable // world.tp)
        world.expect(
            least <= width <= max(least, config.replicas_max), f"{text}, out of {least} to {config.replicas_max}"
        )
        return ""

    @property
    def figures(self) -> dict[str, int]:
        """What has happened."""
        changes = [one.change for one in self._begun.values()]
        grown, shrunk = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
        return {"acts": int(self.acts), "ordered": len(changes), "grown": grown, "shrunk": shrunk}
