"""What the reconciler may ask for: one closed union. Each is idempotent and may be repeated. Pure data.

What the HMM is told as it is decided is its message (common/protocol/hmm.py).
"""

from __future__ import annotations

import msgspec

from elasticmoe.common.layout import Layout, RankId, Seat
from elasticmoe.common.protocol.hmm import AbortLayout, CommitLayout, ReleaseLayout, SetMembership
from elasticmoe.common.protocol.ids import TransitionId
from elasticmoe.common.protocol.rank import RankCommand
from elasticmoe.services.scaler.planning.plan import Leg


class LoadLayout(msgspec.Struct, frozen=True, tag=True):
    """Let the HMM create and fill the layout's memory."""

    layout: Layout


class StartSeat(msgspec.Struct, frozen=True, tag=True):
    """Seat a standby, by the layout of `epoch`."""

    seat: Seat
    epoch: int


class AnnounceLayout(msgspec.Struct, frozen=True, tag=True):
    """The layout serves: write it to the store, where the routers see it."""

    layout: Layout


class EjectRank(msgspec.Struct, frozen=True, tag=True):
    """Kill a rank that lives and makes no progress. `still_s`: for how long; `limit_s`: how long it may."""

    rank: RankId
    incarnation: str
    still_s: float
    limit_s: float


class LeaveOut(msgspec.Struct, frozen=True, tag=True):
    """Begin the operation that leaves out these replicas, whose devices are lost."""

    replicas: tuple[int, ...]


class ScaleTo(msgspec.Struct, frozen=True, tag=True):
    """Order so many replicas, as the policy decided for `reason`. `supersedes`: an operation that gives way first.
    `number`: which of the policy's orders it is."""

    op_id: str
    replicas: int
    reason: str
    supersedes: str = ""
    number: int = 0


class CancelStuck(msgspec.Struct, frozen=True, tag=True):
    """Cancel an operation that does not come to its commit."""

    op_id: str


class Stage(msgspec.Struct, frozen=True, tag=True):
    """Let the HMM make what the leg needs."""

    id: TransitionId
    leg: Leg
    is_throttled: bool


class TellRank(msgspec.Struct, frozen=True, tag=True):
    """Give the rank of `seat` a command."""

    seat: Seat
    command: RankCommand


class StopSeat(msgspec.Struct, frozen=True, tag=True):
    """End a rank that has no seat, or will have none; at once where its device is lost."""

    rank: RankId
    incarnation: str
    is_lost: bool = False


Action = (
    LoadLayout
    | StartSeat
    | SetMembership
    | AnnounceLayout
    | EjectRank
    | LeaveOut
    | ScaleTo
    | CancelStuck
    | Stage
    | TellRank
    | CommitLayout
    | ReleaseLayout
    | AbortLayout
    | StopSeat
)
ActionKey = tuple[type[Action], object, object]


def key_of(action: Action) -> ActionKey | None:
    """Tells a repetition of an action from another one; None for those whose effect is seen in the next turn, which
    are repeated at once."""
    if isinstance(action, StopSeat):
        return StopSeat, action.rank, action.incarnation
    if isinstance(action, TellRank):
        return TellRank, action.seat, action.command
    if isinstance(action, Stage | CommitLayout | ReleaseLayout | AbortLayout):
        return type(action), action.id, None
    return None
