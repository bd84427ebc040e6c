"""The phases after the flip, and what is done about transitions that no operation answers for. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from common.layout import Seat
from common.protocol.ids import CommandId
from common.protocol.rank import CancelMigration, DecodeOnly, MigrateTo, MoveTarget, Precopy
from common.protocol.scaler import HmmStatus, RankLoad
from services.scaler.actions import Abort, Action, Release, StopSeat, TellRank
from services.scaler.leveling import SequenceMove, level, level_ahead
from services.scaler.observation import Observation, Step
from services.scaler.operation import LegProgress, Operation
from services.scaler.steps import (
    BEFORE_COMMIT,
    LEAVE_S,
    MIGRATE_S_MAX,
    OVER,
    ROUND_S,
    empty_leavers,
    enter,
    gone,
    names,
    ours,
    progressed,
    stay,
    take_back,
)

ORPHAN_CANCEL = CommandId("", 0, 0, "cancel")  # of no operation
DECODE_ONLY_STEPS = 6  # what it takes to ask for a place, to copy, and to flip, with one to spare for each


def tidy(seen: Observation, since_s: float, lost: Collection[int]) -> tuple[tuple[Action, ...], str]:
    """Undo or finish what no operation answers for: a transition that no journal knows, ranks without a seat, ranks
    that were told to leave. `since_s`: for how long that has been seen. `lost`: slots whose devices are lost."""
    if seen.hmm is None or seen.pool is None or seen.hmm.phase != "ready" or seen.hmm.layout is None:
        return (), ""
    transition, seats = seen.hmm.transition, seen.hmm.layout.seats
    active = transition is not None and transition.phase not in OVER
    strays = tuple(
        StopSeat(rank.rank, rank.incarnation)
        for rank in seen.pool.ranks
        if rank.slot not in {seat.slot for seat in seats}
    )
    if transition is None or not active:
        back = take_back(ORPHAN_CANCEL, seats, seen)
        return (*strays, *back), "ranks without an operation" if strays or back else ""
    absent = tuple(sorted(slot for slot in lost if slot not in seen.ranks))  # an HMM that restarted may wait for them
    if transition.phase in BEFORE_COMMIT or (transition.phase == "aborting" and absent):
        return (*strays, Abort(transition.id, absent)), f"transition {transition.id} is in no journal: given up"
    # Ranks that left by a committed layout end by themselves once no router needs them.
    late = strays if since_s > LEAVE_S and transition.phase != "committed" else ()
    is_releasable = transition.phase == "flipped" or (transition.phase == "releasing" and absent)
    release = (Release(transition.id, absent),) if is_releasable else ()
    return (*late, *release), f"transition {transition.id} is in no journal: finished"


def migrate(operation: Operation, seen: Observation, hmm: HmmStatus) -> Step[Operation]:
    """Level the load, for MIGRATE_S_MAX at the longest; then release, or for a rebalance: done."""
    actions = _keep_leaving(operation, seen)
    if operation.lost_meanwhile:
        return enter(operation, "release" if operation.plan else "done", "a device was lost meanwhile")
    if operation.kind != "rebalance" and not (operation.current_leg().joining or operation.current_leg().leaving):
        return enter(operation, "release", "no replica came or went")
    leaders = [seat for seat in hmm.layout.seats if seat.rank.tp == 0] if hmm.layout else []
    loads = {seat.slot: seen.loads[seat.slot] for seat in leaders if seat.slot in seen.loads}
    if operation.phase_s > MIGRATE_S_MAX:
        return _end_migration(operation, loads, leaders, actions, f"leveling has had its {MIGRATE_S_MAX:g} s")
    if len(loads) < len(leaders) or not leaders:
        return stay(operation, "ranks tell their load", *actions)
    is_moving = any(load.moving for load in loads.values())
    if is_moving or (operation.progress.num_rounds and operation.elapsed_s - operation.progress.moves_s < ROUND_S):
        return stay(operation, "sequences move", *actions)
    moves = level({slot: load.running + load.waiting + load.moving for slot, load in loads.items()})
    if not moves:
        return _end_migration(operation, loads, leaders, actions, "all replicas have the same load within one")
    rounds = operation.progress.num_rounds + 1
    seats, level_id = {seat.slot: seat for seat in leaders}, operation.command_id("migrate", rounds)
    targets = sorted(_targets(moves, leaders).items())
    actions += [TellRank(seats[source], MigrateTo(level_id, some)) for source, some in targets]
    sources = tuple(sorted({*operation.progress.sources, *(move.source for move in moves)}))
    operation = progressed(operation, num_rounds=rounds, sources=sources, moves_s=operation.elapsed_s)
    return stay(operation, "sequences move", *actions)


def _targets(moves: Iterable[SequenceMove], seats: Iterable[Seat]) -> dict[int, tuple[MoveTarget, ...]]:
    """By the slot that hands over."""
    ranks = {seat.slot: seat.rank for seat in seats}
    targets: dict[int, tuple[MoveTarget, ...]] = {}
    for move in moves:
        target = MoveTarget(ranks[move.target], move.target, move.num_sequences)
        targets[move.source] = (*targets.get(move.source, ()), target)
    return targets


def hurry(operation: Operation, seen: Observation) -> list[Action]:
    """While the HMM makes memory for those that join: keep steps short, for the ranks learn of it between two."""
    leg = operation.current_leg()
    if not leg.joining or leg.leaving:
        return []
    hint = DecodeOnly(operation.command_id("decode_only"), DECODE_ONLY_STEPS)
    return [TellRank(seat, hint) for seat in _untold(operation, seen.loads, hint.id)]


def move_ahead(operation: Operation, seen: Observation) -> tuple[Operation, list[Action]]:
    """Let ranks get sequences ready for those that join, so that these have work from their first step on: places are
    reserved and KV is copied before the commit; sequences are handed over after the flip. All of that, and the flip,
    waits for the ends of steps, so they are kept short meanwhile. Which ones is chosen once: loads change."""
    leg = operation.current_leg()
    if not leg.joining or leg.leaving:
        return operation, []
    leaders, precopy = [seat for seat in leg.layout.seats if seat.rank.tp == 0], operation.command_id("precopy")
    joining = {seat.slot for seat in leg.joining}
    if operation.progress.ahead is None:
        stayers = {seat.slot for seat in leaders} - joining
        if precopy in {load.command for load in seen.loads.values()}:
            # A scaler that has ended told them: what it chose is not known.
            return progressed(operation, ahead=()), []
        is_listened_to = all(slot in seen.ranks or slot in seen.starting for slot in joining)
        if not is_listened_to or not stayers <= set(seen.loads):
            return operation, []
        counts = {slot: seen.loads[slot].running + seen.loads[slot].waiting for slot in stayers}
        moves = level_ahead(counts, {seat.slot for seat in leaders} & joining)
        operation = progressed(operation, ahead=moves)
    targets = _targets(operation.progress.ahead or (), leaders)
    return operation, [
        TellRank(seat, Precopy(precopy, targets.get(seat.slot, ()), DECODE_ONLY_STEPS))
        for seat in _untold(operation, seen.loads, precopy)
    ]


def _untold(operation: Operation, loads: Mapping[int, RankLoad], command: CommandId) -> list[Seat]:
    """The seats that stay, one of each replica, whose ranks do not say that they were told that."""
    return [seat for seat in _leading_stayers(operation) if seat.slot in loads and loads[seat.slot].command != command]


def _leading_stayers(operation: Operation) -> list[Seat]:
    """Seats of the leg's new layout that are in the old one too, one of each replica."""
    leg = operation.current_leg()
    joining = {seat.slot for seat in leg.joining}
    return [seat for seat in leg.layout.seats if seat.rank.tp == 0 and seat.slot not in joining]


def end_ahead(operation: Operation, loads: Mapping[int, RankLoad]) -> tuple[list[Action], bool]:
    """Tell all ranks that `move_ahead` may have told to get nothing ready any more; whether one still does. Who has not
    read the one command yet reads the other after it."""
    if not operation.current_leg().joining:
        return [], False
    return _cancels(operation, _leading_stayers(operation)), bool(_told_ahead(operation, loads))


def _told_ahead(operation: Operation, loads: Mapping[int, RankLoad]) -> set[int]:
    """Slots of the ranks that get sequences ready for this operation's joining ranks, in whichever attempt."""
    commands = ((slot, load.command) for slot, load in loads.items())
    return {slot for slot, at in commands if at is not None and (at.op, at.kind) == (operation.op_id, "precopy")}


def _cancels(operation: Operation, seats: Iterable[Seat]) -> list[Action]:
    return [TellRank(seat, CancelMigration(operation.command_id("cancel"))) for seat in seats]


def _end_migration(
    operation: Operation, loads: Mapping[int, RankLoad], leaders: Sequence[Seat], actions: list[Action], why: str
) -> Step[Operation]:
    told = {*operation.progress.sources, *_told_ahead(operation, loads)}
    ends = _cancels(operation, (seat for seat in leaders if seat.slot in told))
    step = enter(operation, "done" if operation.kind == "rebalance" else "release", why)
    return Step(step.state, (*actions, *ends), why)


def _keep_leaving(operation: Operation, seen: Observation) -> list[Action]:
    """A rank that has left by a layout in force hands over whatever it still gets."""
    return empty_leavers(operation, seen)[0] if operation.plan else []


def release(operation: Operation, seen: Observation, hmm: HmmStatus) -> Step[Operation]:
    """Wait until the HMM has released and who left has ended; then the next leg, or done."""
    leg, transition = operation.current_leg(), ours(operation, hmm)
    actions = _keep_leaving(operation, seen)
    flipped_s = operation.progress.flipped_s
    since_s = operation.elapsed_s - flipped_s if flipped_s is not None else 0.0
    ranks = seen.ranks
    left = [seat for seat in leg.leaving if seat.slot in ranks]
    if since_s > LEAVE_S:
        lost = operation.lost
        actions += [StopSeat(seat.rank, ranks[seat.slot].incarnation, seat in lost) for seat in left]
    if transition is None:
        assert hmm.layout is not None
        if hmm.layout.epoch >= leg.layout.epoch and not left:
            return _finish_leg(operation, "the HMM keeps the new layout and no transition")
        return stay(operation, "the HMM has no transition of this leg", *actions)
    if transition.phase == "released":
        return _finish_leg(operation, "released") if not left else stay(operation, "ranks end", *actions)
    if transition.phase == "flipped" or operation.lost:
        actions.append(Release(operation.transition_id, gone(operation, seen)))
    ending = f"; ranks {names(left)} end" if left else ""
    return stay(operation, f"the HMM gives back what only the old layout used{ending}", *actions)


def _finish_leg(operation: Operation, why: str) -> Step[Operation]:
    following = operation.leg + 1
    if following >= operation.num_legs:
        return enter(operation, "done", why)
    why = f"leg {following + 1} of {operation.num_legs}"
    return enter(operation, "prepare", why, leg=following, progress=LegProgress())
