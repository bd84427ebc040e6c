"""A scale operation as the journal holds it, and the actions that bring it on. Pure data.

An operation has one or two legs; each changes the layout by one epoch and passes through the phases prepare, commit,
migrate and release. Times are counted by the scaler's monotonic clock and kept as sums, so that a restarted scaler goes
on counting; what passed while none ran is not counted.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from common.layout import Layout, RankId, Seat
from common.protocol.rank import MoveTarget
from common.protocol.replies import Refused
from services.scaler.leveling import SequenceMove
from services.scaler.plan import Leg, Plan

Phase = Literal["plan", "prepare", "commit", "migrate", "release", "abort", "done", "aborted"]
Kind = Literal["scale_up", "scale_down", "replace", "none", "rebalance"]

FINISHED: frozenset[Phase] = frozenset({"done", "aborted"})
DEADLINE_S = 600.0
TIMINGS_MAX = 64


class Request(msgspec.Struct, frozen=True):
    """What was asked for: one of the first three, or none of them for a rebalance. `remove`: replica numbers;
    `is_lost`: of replicas whose devices have lost their memory."""

    replicas: int | None = None
    devices: tuple[str, ...] | None = None
    remove: tuple[int, ...] | None = None
    reason: str = ""
    deadline_s: float = DEADLINE_S
    is_lost: bool = False


class DeviceChange(msgspec.Struct, frozen=True):
    """What a plan does to one device: expert records and bytes that come to it, expert records that it holds before and
    after, KV handles after, the most bytes at any instant."""

    experts_in: int
    bytes_in: int
    experts_before: int
    experts_after: int
    kv_handles_after: int
    peak_bytes: int


class Planned(msgspec.Struct, frozen=True):
    """A plan in short, kept when the plan itself is not. `seconds`, `pause_ms` and peaks are predictions."""

    epoch_before: int
    epoch_after: int
    replicas_before: int
    replicas_after: int
    joining: tuple[str, ...]
    leaving: tuple[str, ...]
    experts_moved: int
    bytes_copied: int
    peak_bytes: int
    bytes_before: int
    bytes_after: int
    seconds: float
    pause_ms: float
    devices: dict[str, DeviceChange]


class PhaseTime(msgspec.Struct, frozen=True):
    """How long a leg stayed in a phase."""

    leg: int
    phase: Phase
    seconds: float


class Figures(msgspec.Struct, frozen=True):
    """What an operation has cost so far, beside what was planned. Bytes, seconds.

    `capacity_s`: from the command until the joining replicas were members; None where none join. `flip_s_max`: the
    longest time from a commit until all ranks were seen to have flipped: no stream paused for longer because of it.
    `peak_bytes`: the most real bytes of each device; `peak_bytes_total`: their sum.
    """

    capacity_s: float | None = None
    flip_s_max: float | None = None
    bytes_copied: int = 0
    bytes_planned: int = 0
    peak_bytes: dict[str, int] = {}
    peak_bytes_total: int = 0
    peak_bytes_planned: int = 0
    kv_blocks_before: int | None = None
    kv_blocks_after: int | None = None
    sequences_moved: int = 0


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One operation. Changed only by `transition.advance`, and by a cancel.

    `plan`: None for a rebalance, and when it is over. `attempt`: of staging this leg. `clock`: the monotonic reading
    that `elapsed_s` and `phase_s` (seconds since it was accepted, and in this phase) were counted to; None after a
    restart. `lost_before`: devices that had been lost when it was accepted. `lost_meanwhile`: devices that
    have been lost since: it is given up, or ends with this leg, for an operation that leaves them out. `committed_s`,
    `flipped_s`, `moves_s`: `elapsed_s` when this leg's commit was first sent or seen, when it was seen to have flipped,
    when sequences were last told to move. `ahead`: what is got ready for this attempt's joining ranks, once that has
    been chosen. `retry_s`: staged again not before. `bytes_prior`: copied for staging attempts before `bytes_of`, whose
    op_id and bytes these are. `handed_over[rank's incarnation]`: its counter when first and last seen.
    """

    op_id: str
    kind: Kind
    request: Request
    plan: Plan | None
    accepted_unix: float
    deadline_s: float
    planned: Planned | None = None
    num_legs: int = 0
    leg: int = 0
    attempt: int = 0
    phase: Phase = "plan"
    why: str = "accepted"
    clock: float | None = None
    elapsed_s: float = 0.0
    phase_s: float = 0.0
    timings: tuple[PhaseTime, ...] = ()
    error: Refused | None = None
    is_cancelled: bool = False
    is_late: bool = False
    lost_before: tuple[str, ...] = ()
    lost_meanwhile: tuple[str, ...] = ()
    retry_s: float = 0.0
    committed_s: float | None = None
    flipped_s: float | None = None
    sources: tuple[int, ...] = ()
    ahead: tuple[SequenceMove, ...] | None = None
    moves_s: float = 0.0
    num_rounds: int = 0
    bytes_prior: int = 0
    bytes_of: tuple[str, int] = ("", 0)
    handed_over: dict[str, tuple[int, int]] = {}
    figures: Figures = Figures()

    @property
    def stage_id(self) -> str:
        """The op_id under which the HMM knows this leg's present attempt."""
        return f"{self.op_id}/{self.leg}.{self.attempt}"

    @property
    def soon_id(self) -> str:
        """The op_id under which ranks are told to keep their steps short while the HMM copies."""
        return f"{self.stage_id}.soon"

    @property
    def end_id(self) -> str:
        """The op_id under which ranks are told to hand over nothing more."""
        return f"{self.stage_id}.end"

    @property
    def ahead_id(self) -> str:
        """The op_id under which ranks are told to get sequences ready for this attempt's joining ranks."""
        return f"{self.stage_id}.ahead"

    @property
    def lost(self) -> tuple[Seat, ...]:
        """Seats, before or after the present leg, whose devices have lost their memory."""
        if self.is_finished or not self.num_legs:
            return ()
        gone = self.current_leg().leaving if self.request.is_lost else ()
        if not self.lost_meanwhile:
            return gone
        seats = {*self.layout_before().seats, *self.current_leg().layout.seats}
        found = {*gone, *(seat for seat in seats if seat.device in self.lost_meanwhile)}
        return tuple(sorted(found, key=lambda seat: seat.rank))

    @property
    def is_finished(self) -> bool:
        """Whether nothing will happen any more."""
        return self.phase in FINISHED

    @property
    def mark(self) -> tuple[int, int, Phase, bool, tuple[str, ...]]:
        """What has to be in the store before the commands of this state are sent."""
        return self.leg, self.attempt, self.phase, self.is_cancelled, self.lost_meanwhile

    def current_leg(self) -> Leg:
        """The leg that is under way. Only for operations with a plan."""
        assert self.plan is not None
        return self.plan.legs[self.leg]

    def layout_before(self) -> Layout:
        """The layout that the present leg starts from. Only for operations with a plan."""
        assert self.plan is not None
        return self.plan.legs[self.leg - 1].layout if self.leg else self.plan.before


class Stage(msgspec.Struct, frozen=True, tag=True):
    """Let the HMM make what the leg needs."""

    op_id: str
    leg: Leg
    is_throttled: bool


class StartSeat(msgspec.Struct, frozen=True, tag=True):
    """Seat a standby on a joining device."""

    op_id: str
    seat: Seat
    epoch: int


class MoveSequences(msgspec.Struct, frozen=True, tag=True):
    """Tell the rank of `seat` to hand sequences over; without targets, to hand over nothing. Its next `urgent_steps`
    steps only decode."""

    op_id: str
    seat: Seat
    targets: tuple[MoveTarget, ...]
    is_leaving: bool
    urgent_steps: int = 0


class Commit(msgspec.Struct, frozen=True, tag=True):
    """Let the staged layout come into force."""

    op_id: str


class Release(msgspec.Struct, frozen=True, tag=True):
    """Let the HMM give back what only the old layout used. `gone`: slots of lost devices, without a rank."""

    op_id: str
    gone: tuple[int, ...] = ()


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Let the HMM give back what was staged. `gone` as of Release."""

    op_id: str
    gone: tuple[int, ...] = ()


class StopSeat(msgspec.Struct, frozen=True, tag=True):
    """End a rank that has no seat, or will have none."""

    op_id: str
    rank: RankId
    incarnation: str


Action = Stage | StartSeat | MoveSequences | Commit | Release | Abort | StopSeat


def key_of(action: Action) -> tuple[str, str, str]:
    """Tells a repetition of an action from another one."""
    what = ""
    if isinstance(action, StartSeat):
        what = str(action.seat.slot)
    elif isinstance(action, MoveSequences):
        what = f"{action.seat.slot} {len(action.targets)}"
    elif isinstance(action, StopSeat):
        what = action.incarnation
    return type(action).__name__, action.op_id, what
