"""A world for the state machine of an operation: an HMM, a pool and ranks that do what they are told, as values."""

from __future__ import annotations

import itertools

import msgspec

from elasticmoe.common.capacity import Sizes
from elasticmoe.common.devices.names import LOCAL_HOST
from elasticmoe.common.layout import Layout, RankId, Seat
from elasticmoe.common.model_spec import KvGeometry, RecordKey
from elasticmoe.common.protocol.hmm import AbortLayout, CommitLayout, RecordCopy, ReleaseLayout
from elasticmoe.common.protocol.ids import CommandId, CommandKind
from elasticmoe.common.protocol.rank import CancelMigration, DecodeOnly, Drain, MigrateTo, Precopy, RankCommand
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.scaler import (
    DeviceStatus,
    HmmStatus,
    MemoryFacts,
    PoolRank,
    PoolStatus,
    RankLoad,
    TransitionStatus,
)
from elasticmoe.services.scaler.actions import Action, Stage, StartSeat, StopSeat, TellRank
from elasticmoe.services.scaler.cluster import Cluster, HostStatus, in_force
from elasticmoe.services.scaler.control.reconciler import advance
from elasticmoe.services.scaler.observation import Observation
from elasticmoe.services.scaler.operation.operation import Operation, Request
from elasticmoe.services.scaler.planning.plan import Leg, Plan

DEVICES = tuple(f"host:{i}" for i in range(4))
SIZES = Sizes(100, (10,), (7,))
SEATS = tuple(Seat(RankId(i, 0), i, DEVICES[i]) for i in range(4))


def layout_of(epoch: int, slots: tuple[int, ...], homes: tuple[int, ...] | None = None) -> Layout:
    """One layer with four experts, spread over `homes` (default: all slots)."""
    homes = homes or slots
    experts = tuple((homes[expert % len(homes)],) for expert in range(4))
    return Layout(epoch, 1, tuple(SEATS[slot] for slot in slots), (experts,))


def leg_of(before: Layout, after: Layout) -> Leg:
    joining = tuple(seat for seat in after.seats if seat not in before.seats)
    leaving = tuple(seat for seat in before.seats if seat not in after.seats)
    copies = (RecordCopy(RecordKey("expert", 0, 0), "host:0", "host:1"),)
    handles = {seat.device: 4 for seat in (*before.seats, *joining)}
    return Leg(after, joining, leaving, copies, handles, handles, 1000, {device: 50 for device in handles})


def plan_of(kind: str, *layouts: Layout) -> Plan:
    legs = tuple(leg_of(before, after) for before, after in itertools.pairwise(layouts))
    return Plan(kind, layouts[0], legs, 1, 1000 * len(legs), 100, 80, 90, 0.5, 20.0)


FIRST = layout_of(1, (0, 1))
UP = plan_of("scale_up", layout_of(1, (0, 1)), layout_of(2, (0, 1, 2), (0, 1)), layout_of(3, (0, 1, 2)))
DOWN = plan_of("scale_down", layout_of(1, (0, 1, 2)), layout_of(2, (0, 2)))


def operation_of(plan: Plan | None, *, deadline_s: float = 60.0) -> Operation:
    return Operation(
        op_id="op",
        kind=plan.kind if plan else "rebalance",
        request=Request(replicas=3),
        plan=plan,
        accepted_unix=0.0,
        deadline_s=deadline_s,
        num_legs=len(plan.legs) if plan else 0,
    )


KINDS: dict[type[RankCommand], CommandKind] = {
    MigrateTo: "migrate",
    Precopy: "precopy",
    DecodeOnly: "decode_only",
    Drain: "drain",
    CancelMigration: "cancel",
}


def cluster_of(hmm: HmmStatus | None, pool: PoolStatus | None = None, *, beginning: Layout = FIRST) -> Cluster:
    """A deployment of one host that answers so, and has told nothing before."""
    hosts = {LOCAL_HOST: HostStatus(hmm, pool)}
    return Cluster(hosts, in_force(hosts, None, beginning))


def host_of(seen: Observation) -> HostStatus:
    """What its one host has answered."""
    return seen.cluster.hosts[LOCAL_HOST]


def answered(seen: Observation, **changes: object) -> Observation:
    """The same, but for what the HMM or the pool has answered."""
    status = msgspec.structs.replace(host_of(seen), **changes)
    return msgspec.structs.replace(seen, cluster=cluster_of(status.hmm, status.pool))


class World:
    """Obeys commands at once; `progress` lets time do the rest. What the state machine may never do is asserted."""

    def __init__(self, layout: Layout, sequences: dict[int, int] | None = None) -> None:
        self.layout = layout
        self.running = {seat.slot: 2 for seat in layout.seats} | (sequences or {})
        self.transition: TransitionStatus | None = None
        self.staged: Layout | None = None
        self.ranks = {seat.slot: f"rank-{seat.rank}:0" for seat in layout.seats}
        self.leaving: set[int] = set()
        self.commands: dict[int, CommandId] = {}
        self.targets: dict[int, tuple[tuple[int, int], ...]] = {}
        self.handed = dict.fromkeys(range(4), 0)
        self.starts = 0
        self.standby = 2
        self.is_durable = True
        self.no_room = ""
        self.hmm_answers = True
        self.pool_answers = True
        self.refused: Refused | None = None
        self.exits: dict[int, str] = {}
        self.log: list[str] = []
        self.now = 0.0

    def seen(self) -> Observation:
        loads = {
            slot: RankLoad(
                SEATS[slot].rank,
                incarnation,
                self.running.get(slot, 0),
                0,
                0,
                self.handed[slot],
                0,
                5,
                9,
                slot in self.leaving,
                self.commands.get(slot),
                1,
                self.layout.epoch,
            )
            for slot, incarnation in self.ranks.items()
        }
        devices = tuple(
            DeviceStatus(device, 100, 10, 10, 10, 70, 4, 8, self.ranks.get(slot)) for slot, device in enumerate(DEVICES)
        )
        facts = MemoryFacts(4096, KvGeometry(16, 4096, 4096, 1, 4096), 80, 10, 1, 1)
        hmm = HmmStatus(
            "ready",
            0,
            0,
            None,
            devices,
            self.layout.epoch,
            self.layout.slots,
            True,
            "load",
            self.layout,
            facts,
            self.transition,
        )
        pool = PoolStatus(
            self.standby,
            tuple(
                PoolRank(SEATS[slot].rank, slot, DEVICES[slot], incarnation, 1, True)
                for slot, incarnation in self.ranks.items()
            ),
        )
        return Observation(
            cluster=cluster_of(hmm if self.hmm_answers else None, pool if self.pool_answers else None),
            loads=loads if self.pool_answers else {},
            exits=self.exits,
            stage_refused=self.refused,
            is_durable=self.is_durable,
            no_room=self.no_room,
        )

    # ---- commands

    def obey(self, action: Action) -> None:
        self.log.append(type(action).__name__.removesuffix("Layout"))
        status = self.transition
        if isinstance(action, Stage):
            assert status is None or status.phase in ("released", "aborted") or status.id == action.id
            assert action.leg.layout.epoch == self.layout.epoch + 1
            assert self.is_durable, "staged without a record"
            if status is None or status.id != action.id:
                self.staged = action.leg.layout
                total = action.leg.bytes_copied
                self.transition = TransitionStatus(
                    action.id, self.staged.epoch, "copying", (), 0, total, {"host:0": 60}
                )
        elif isinstance(action, CommitLayout):
            assert self.is_durable, "committed without a record"
            assert status is not None
            assert self.staged is not None
            if status.phase != "staged":
                return
            assert set(self.staged.slots) <= set(status.prepared), "committed unprepared"
            for slot in set(self.layout.slots) - set(self.staged.slots):
                assert self.running[slot] == 0, "committed while a leaving rank has sequences"
            self.layout = self.staged
            self._phase("committed")
        elif isinstance(action, ReleaseLayout):
            if status and status.phase == "flipped":
                self._phase("releasing")
        elif isinstance(action, AbortLayout):
            assert status is not None
            new = set(self.staged.slots if self.staged else ()) - set(self.layout.slots)
            if status.phase in ("copying", "staged", "failed", "vacating") and not new & set(self.ranks):
                self._phase("aborting")
        elif isinstance(action, StartSeat):
            assert status is not None
            assert status.phase == "staged", "a rank joins before its memory is there"
            self.starts += 1
            self.ranks[action.seat.slot] = f"rank-{action.seat.rank}:{self.starts}"
        elif isinstance(action, StopSeat):
            for slot in [slot for slot, incarnation in self.ranks.items() if incarnation == action.incarnation]:
                self.end(slot)
        elif isinstance(action, TellRank):
            self._tell(action)

    def _tell(self, action: TellRank) -> None:
        slot, command = action.seat.slot, action.command
        assert KINDS[type(command)] == command.id.kind, "a command's name is of another kind"
        self.commands[slot] = command.id
        targets = () if isinstance(command, DecodeOnly | CancelMigration) else command.targets
        self.targets[slot] = tuple((target.slot, target.num_sequences) for target in targets)
        self.leaving.discard(slot)
        if isinstance(command, Drain):
            self.leaving.add(slot)

    def end(self, slot: int) -> None:
        self.ranks.pop(slot, None)
        self.leaving.discard(slot)

    def _phase(self, phase: str) -> None:
        assert self.transition is not None
        self.transition = msgspec.structs.replace(self.transition, phase=phase)

    # ---- what time does

    def progress(self) -> None:
        self.now += 0.3
        for slot, targets in list(self.targets.items()):
            here = [(target, count) for target, count in targets if target in self.layout.slots]
            for target, count in here:
                count = min(count, self.running[slot]) if slot not in self.leaving else self.running[slot]
                self.running[slot] -= count
                self.running[target] = self.running.get(target, 0) + count
                self.handed[slot] += count
            self.targets[slot] = tuple(set(targets) - set(here)) if slot not in self.leaving else targets
        status = self.transition
        if status is None or self.staged is None:
            return
        if status.phase == "copying":
            self.transition = msgspec.structs.replace(status, phase="staged", bytes_done=status.bytes_total)
        elif status.phase == "staged":
            self.transition = msgspec.structs.replace(status, prepared=tuple(sorted(self.ranks)))
        elif status.phase == "committed":
            self._phase("flipped")
        elif status.phase in ("flipped", "releasing"):
            for slot in set(self.ranks) - set(self.layout.slots):
                self.end(slot)
            if status.phase == "releasing":
                self._phase("released")
        elif status.phase == "aborting":
            self._phase("aborted")

    def step(self, operation: Operation) -> Operation:
        step = advance(operation, self.seen(), self.now)
        for action in step.actions:
            self.obey(action)
        return step.state

    def run(self, operation: Operation, *, steps: int = 200) -> Operation:
        """Until the operation has ended."""
        for _ in range(steps):
            operation = self.step(operation)
            if operation.is_finished:
                return operation
            self.progress()
        raise AssertionError(f"still in {operation.phase}: {operation.why}")

    def run_to(self, operation: Operation, phase: str, leg: int = 0) -> Operation:
        """Until the operation is in `phase` of `leg`."""
        for _ in range(100):
            if (operation.phase, operation.leg) == (phase, leg):
                return operation
            operation = self.step(operation)
            self.progress()
        raise AssertionError(f"never came to {phase}: {operation.phase}, {operation.why}")
