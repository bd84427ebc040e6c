"""A scale operation as the journal holds it. Pure data.

An operation has one or two legs; each changes the layout by one epoch and passes through the phases prepare, commit,
migrate and release. Times are counted by the scaler's monotonic clock and kept as sums, so that a restarted scaler goes
on counting; what passed while none ran is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from elasticmoe.common.capacity import Sizes
from elasticmoe.common.described import says
from elasticmoe.common.devices.names import hardware_of
from elasticmoe.common.layout import Layout, Seat
from elasticmoe.common.protocol.ids import CommandId, CommandKind, TransitionId
from elasticmoe.common.protocol.limits import TRACEPARENT_CHARS_MAX, TRACESTATE_CHARS_MAX
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.services.scaler.planning.plan import Leg, Plan
from elasticmoe.services.scaler.planning.rebalance import SequenceMove

OperationPhase = Literal["plan", "prepare", "commit", "migrate", "release", "abort", "done", "aborted"]
OperationOutcome = Literal["done", "cancelled", "aborted"]
OperationKind = Literal["scale_up", "scale_down", "replace", "none", "rebalance"]

FINISHED: frozenset[OperationPhase] = frozenset({"done", "aborted"})
DEADLINE_S = 600.0
TIMINGS_MAX = 64


class Request(msgspec.Struct, frozen=True):
    """What was asked for: one of the first three, or none of them for a rebalance."""

    replicas: Annotated[int | None, says("How many replicas to have")] = None
    devices: Annotated[tuple[str, ...] | None, says("Exactly the devices to use")] = None
    remove: Annotated[tuple[int, ...] | None, says("Numbers of replicas that leave")] = None
    reason: Annotated[str, says("Kept with the operation")] = ""
    deadline_s: Annotated[float, says("Undone unless it is committed by then")] = DEADLINE_S
    is_lost: Annotated[bool, says("The devices of `remove` have lost their memory")] = False

    @property
    def aim(self) -> tuple[object, ...]:
        """What is to come of it; the rest is how, and why."""
        return self.replicas, self.devices, self.remove, self.is_lost


class DeviceChange(msgspec.Struct, frozen=True):
    """What a plan does to one device."""

    experts_in: Annotated[int, says("Expert records that come to it")]
    bytes_in: Annotated[int, says("Bytes that come to it")]
    experts_before: Annotated[int, says("Expert records that it holds before")]
    experts_after: Annotated[int, says("Expert records that it holds afterwards")]
    kv_handles_after: Annotated[int, says("KV handles afterwards; 0 for a device that leaves")]
    peak_bytes: Annotated[int, says("The most bytes at any instant")]


class Planned(msgspec.Struct, frozen=True):
    """A plan in short, kept when the plan itself is not."""

    epoch_before: Annotated[int, says("Epoch of the layout that it starts from")]
    epoch_after: Annotated[int, says("Epoch of the layout that it leads to")]
    replicas_before: Annotated[int, says("Replicas before")]
    replicas_after: Annotated[int, says("Replicas afterwards")]
    joining: Annotated[tuple[str, ...], says("Ranks that come")]
    leaving: Annotated[tuple[str, ...], says("Ranks that go")]
    experts_moved: Annotated[int, says("Expert records that are copied")]
    bytes_copied: Annotated[int, says("Bytes that are copied")]
    peak_bytes: Annotated[int, says("The most bytes of all devices at any instant, as predicted")]
    bytes_before: Annotated[int, says("Bytes of all devices before")]
    bytes_after: Annotated[int, says("Bytes of all devices afterwards")]
    seconds: Annotated[float, says("How long it takes, as predicted")]
    pause_ms: Annotated[float, says("The longest pause of a stream, as predicted")]
    devices: Annotated[dict[str, DeviceChange], says("What happens to each device")]


class PhaseTime(msgspec.Struct, frozen=True):
    """How long a leg stayed in a phase."""

    leg: Annotated[int, says("The leg, from 0")]
    phase: Annotated[OperationPhase, says("The phase")]
    seconds: Annotated[float, says("How long")]


class Figures(msgspec.Struct, frozen=True):
    """What an operation has cost so far, beside what was planned."""

    capacity_s: Annotated[
        float | None, says("From the command until the joining replicas were members; null where none join")
    ] = None
    flip_s_max: Annotated[
        float | None,
        says(
            "The longest time from a commit until all ranks were seen to have flipped: no stream paused for longer "
            "because of it"
        ),
    ] = None
    bytes_copied: Annotated[int, says("Bytes copied")] = 0
    bytes_planned: Annotated[int, says("Bytes that were planned to be copied")] = 0
    peak_bytes: Annotated[dict[str, int], says("The most real bytes of each device")] = {}
    peak_bytes_total: Annotated[int, says("Their sum")] = 0
    peak_bytes_planned: Annotated[int, says("The most bytes that were planned")] = 0
    kv_blocks_before: Annotated[int | None, says("KV blocks of all replicas before")] = None
    kv_blocks_after: Annotated[int | None, says("KV blocks of all replicas afterwards")] = None
    sequences_moved: Annotated[int, says("Running requests that went to another rank")] = 0


class LegProgress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the present leg has come. A new attempt or leg begins with a new one: nothing is reset by hand.

    attempt: of staging this leg, from 0
    retry_s: staged not before; this and the other times are counted as `Operation.elapsed_s` is
    committed_s: when the commit was first sent or seen
    flipped_s: when all ranks were seen to have flipped
    ahead: what is got ready for the joining ranks, once that has been chosen
    sources: slots of ranks that were told to hand sequences over
    moves_s: when they were last told
    num_rounds: how often they were told
    """

    attempt: int = 0
    retry_s: float = 0.0
    committed_s: float | None = None
    flipped_s: float | None = None
    ahead: tuple[SequenceMove, ...] | None = None
    sources: tuple[int, ...] = ()
    moves_s: float = 0.0
    num_rounds: int = 0


class Accounting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operation has taken so far, over all legs and attempts.

    timings: of the phases that are over
    bytes_prior: copied for staging attempts before `bytes_of`
    bytes_of: the last attempt to be counted, and its bytes; None before the first
    handed_over: by a rank's incarnation, its counter when first and last seen
    figures: what is shown
    """

    timings: tuple[PhaseTime, ...] = ()
    bytes_prior: int = 0
    bytes_of: tuple[TransitionId, int] | None = None
    handed_over: dict[str, tuple[int, int]] = {}
    figures: Figures = Figures()


class CallerTrace(msgspec.Struct, frozen=True):
    """The trace of whoever ordered an operation: W3C's headers, empty where there were none."""

    traceparent: Annotated[str, Meta(max_length=TRACEPARENT_CHARS_MAX)] = ""
    tracestate: Annotated[str, Meta(max_length=TRACESTATE_CHARS_MAX)] = ""

    @property
    def carrier(self) -> dict[str, str]:
        """As headers."""
        return {"traceparent": self.traceparent, "tracestate": self.tracestate} if self.traceparent else {}


NO_CALLER = CallerTrace()


class Operation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One operation. Changed only by the reconciler's `advance`, and by orders that end it: a cancel, a device's loss.

    form: of its record; store/records.py reads the one before as well
    accepted_unix, deadline_s, planned, num_legs, lost_before, caller, policy_order: as of its acceptance; `lost_before`
        names the devices that had been lost, `policy_order` which of the policy's orders it is, None for an operator's
    plan: None for a rebalance, and when it is over
    leg, phase, why: where it stands
    clock: the monotonic reading that the two sums were counted to; None after a restart
    elapsed_s, phase_s: since it was accepted, and in this phase
    is_late: past its deadline
    lost_meanwhile: devices that have been lost since; it is given up, or ends with this leg, for an operation that
        leaves them out
    """

    form: Literal[2] = 2
    op_id: str
    kind: OperationKind
    request: Request
    accepted_unix: float
    deadline_s: float
    plan: Plan | None
    planned: Planned | None = None
    num_legs: int = 0
    lost_before: tuple[str, ...] = ()
    caller: CallerTrace = NO_CALLER
    policy_order: int | None = None
    leg: int = 0
    phase: OperationPhase = "plan"
    why: str = "accepted"
    clock: float | None = None
    elapsed_s: float = 0.0
    phase_s: float = 0.0
    error: Refused | None = None
    is_cancelled: bool = False
    is_late: bool = False
    lost_meanwhile: tuple[str, ...] = ()
    progress: LegProgress = LegProgress()
    accounting: Accounting = Accounting()

    @property
    def transition_id(self) -> TransitionId:
        """The name under which the HMM knows this leg's present attempt."""
        return TransitionId(self.op_id, self.leg, self.progress.attempt)

    def command_id(self, kind: CommandKind, round: int = 0) -> CommandId:
        """The name of what this leg's ranks are told."""
        return CommandId(self.op_id, self.leg, 0 if kind == "drain" else self.progress.attempt, kind, round)

    @property
    def lost(self) -> tuple[Seat, ...]:
        """Seats, before or after the present leg, whose devices have lost their memory."""
        if self.is_finished or not self.num_legs:
            return ()
        gone = self.current_leg().leaving if self.request.is_lost else ()
        if not self.lost_meanwhile:
            return gone
        seats = {*self.layout_before().seats, *self.current_leg().layout.seats}
        lost = set(map(hardware_of, self.lost_meanwhile))
        found = {*gone, *(seat for seat in seats if hardware_of(seat.device) in lost)}
        return tuple(sorted(found, key=lambda seat: seat.rank))

    @property
    def lost_devices(self) -> set[str]:
        """Devices whose loss the operation is to answer, or that were lost while it ran."""
        changes = self.planned.devices if self.planned is not None and self.request.is_lost else {}
        return {*self.lost_meanwhile, *(device for device, change in changes.items() if not change.kv_handles_after)}

    @property
    def is_finished(self) -> bool:
        """Whether nothing will happen any more."""
        return self.phase in FINISHED

    @property
    def mark(self) -> tuple[int, int, OperationPhase, bool, tuple[str, ...]]:
        """What has to be in the store before the commands of this state are sent."""
        return self.leg, self.progress.attempt, self.phase, self.is_cancelled, self.lost_meanwhile

    def current_leg(self) -> Leg:
        """The leg that is under way. Only for operations with a plan."""
        assert self.plan is not None
        return self.plan.legs[self.leg]

    def layout_before(self) -> Layout:
        """The layout that the present leg starts from. Only for operations with a plan."""
        assert self.plan is not None
        return self.plan.legs[self.leg - 1].layout if self.leg else self.plan.before


def cancel(operation: Operation) -> Operation:
    """Ask for an abort. Only before the commit of the first leg: see `can_cancel`."""
    return msgspec.structs.replace(operation, is_cancelled=True)


def without_lost(operation: Operation, devices: Iterable[str]) -> Operation:
    """These devices have been lost: let the operation end where a layout is complete, before or after its present leg,
    so that the one that leaves them out can begin."""
    return msgspec.structs.replace(operation, lost_meanwhile=tuple(sorted({*operation.lost_meanwhile, *devices})))


def can_cancel(operation: Operation, *, is_durable: bool) -> bool:
    """Whether a cancel still leads back to the old layout: until the store has the record of the first commit, which is
    not sent before."""
    if operation.request.is_lost or operation.lost_meanwhile:
        return False  # its ranks have been ended
    if operation.leg or operation.kind == "rebalance":
        return False
    is_commit_open = operation.phase == "commit" and operation.progress.committed_s is None and not is_durable
    return is_commit_open or operation.phase in ("plan", "prepare", "abort")


def outcome(operation: Operation) -> OperationOutcome:
    """How a finished operation ended."""
    if operation.phase == "done":
        return "done"
    return "cancelled" if operation.error and operation.error.code == "cancelled" else "aborted"


def planned_of(plan: Plan, sizes: Sizes) -> Planned:
    """The plan in short."""
    before, after = plan.before, plan.after
    names = dict.fromkeys(
        seat.device for layout in (before, *(leg.layout for leg in plan.legs)) for seat in layout.seats
    )
    devices = {}
    for name in names:
        arrivals = [copy.key for leg in plan.legs for copy in leg.copies if copy.target == name]
        was, will = before.seat_on(name), after.seat_on(name)
        devices[name] = DeviceChange(
            experts_in=sum(key.kind == "expert" for key in arrivals),
            bytes_in=sum(sizes.of(key) for key in arrivals),
            experts_before=before.num_experts_on(was.slot) if was else 0,
            experts_after=after.num_experts_on(will.slot) if will else 0,
            kv_handles_after=plan.legs[-1].kv_handles_after.get(name, 0) if plan.legs else 0,
            peak_bytes=max((leg.peak_bytes.get(name, 0) for leg in plan.legs), default=0),
        )
    return Planned(
        epoch_before=before.epoch,
        epoch_after=after.epoch,
        replicas_before=before.dp,
        replicas_after=after.dp,
        joining=tuple(str(seat.rank) for leg in plan.legs for seat in leg.joining),
        leaving=tuple(str(seat.rank) for leg in plan.legs for seat in leg.leaving),
        experts_moved=plan.experts_moved,
        bytes_copied=plan.bytes_copied,
        peak_bytes=plan.peak_bytes,
        bytes_before=plan.bytes_before,
        bytes_after=plan.bytes_after,
        seconds=plan.seconds,
        pause_ms=plan.pause_ms,
        devices=devices,
    )
