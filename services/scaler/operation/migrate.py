"""Sequences: they leave ranks that go, are got ready for ranks that come, and are levelled after the flip. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from elasticmoe.common.layout import Seat
from elasticmoe.common.protocol.ids import CommandId
from elasticmoe.common.protocol.rank import CancelMigration, DecodeOnly, Drain, MigrateTo, MoveTarget, Precopy
from elasticmoe.common.protocol.scaler import RankLoad
from elasticmoe.services.scaler.actions import Action, TellRank
from elasticmoe.services.scaler.observation import Observation, Step
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.operation.steps import enter, progressed, stay
from elasticmoe.services.scaler.planning.rebalance import SequenceMove, level, level_ahead

MIGRATE_S_MAX = 5.0  # leveling is best effort
ROUND_S = 0.25  # between two looks at what leveling has done
DECODE_ONLY_STEPS = 6  # what it takes to ask for a place, to copy, and to flip, with one to spare for each


def migrate(operation: Operation, seen: Observation) -> Step[Operation]:
    """Level the load, for MIGRATE_S_MAX at the longest; then release, or for a rebalance: done."""
    actions = keep_leaving(operation, seen)
    if operation.plan is not None and not operation.lost_meanwhile:
        leg = operation.current_leg()
        if not (leg.joining or leg.leaving):
            return enter(operation, "release", "no replica came or went")
    committed = seen.cluster.in_force.committed
    leaders = [seat for seat in committed.seats if seat.rank.tp == 0] if committed is not None else []
    loads = {seat.slot: seen.loads[seat.slot] for seat in leaders if seat.slot in seen.loads}
    if operation.lost_meanwhile:
        return _end_migration(operation, loads, leaders, actions, "a device was lost meanwhile")
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


def _end_migration(
    operation: Operation, loads: Mapping[int, RankLoad], leaders: Sequence[Seat], actions: list[Action], why: str
) -> Step[Operation]:
    """No command to move sequences, of this operation or another, outlives this phase: its targets may be gone one day.
    A rank that does not tell its load now is told as well, unless its device was lost: then it is ended."""
    told = {*operation.progress.sources, *(slot for slot, load in loads.items() if _is_moving(load))}
    living = [seat for seat in leaders if seat.device not in operation.lost_meanwhile]
    ends = cancels(operation, (seat for seat in living if seat.slot in told or seat.slot not in loads))
    step = enter(operation, "done" if operation.kind == "rebalance" else "release", why)
    return Step(step.state, (*actions, *ends), why)


def _targets(moves: Iterable[SequenceMove], seats: Iterable[Seat]) -> dict[int, tuple[MoveTarget, ...]]:
    """By the slot whose rank hands over."""
    ranks = {seat.slot: seat.rank for seat in seats}
    targets: dict[int, tuple[MoveTarget, ...]] = {}
    for move in moves:
        target = MoveTarget(ranks[move.target], move.target, move.num_sequences)
        targets[move.source] = (*targets.get(move.source, ()), target)
    return targets


def hurry(operation: Operation, seen: Observation) -> list[Action]:
    """While the HMM makes memory for ranks that join, keep steps short: the others learn of it between two steps."""
    leg = operation.current_leg()
    if not leg.joining or leg.leaving:
        return []
    hint = DecodeOnly(operation.command_id("decode_only"), DECODE_ONLY_STEPS)
    return [TellRank(seat, hint) for seat in _untold(operation, seen.loads, hint.id)]


def move_ahead(operation: Operation, seen: Observation) -> tuple[Operation, list[Action]]:
    """Let ranks get sequences ready for those that join, so that these have work from their first step on: places are
    reserved and KV is copied before the commit; sequences are handed over after the flip. All of that, and the flip,
    waits for the ends of steps, so steps are kept short meanwhile. Which rank hands how many sequences to which is
    chosen once, because loads change."""
    leg = operation.current_leg()
    if not leg.joining or leg.leaving:
        return operation, []
    leaders, precopy = [seat for seat in leg.layout.seats if seat.rank.tp == 0], operation.command_id("precopy")
    joining = {seat.slot for seat in leg.joining}
    if operation.progress.ahead is None:
        stayers = {seat.slot for seat in leaders} - joining
        if precopy in {load.command for load in seen.loads.values()}:
            # They were told by a scaler that has ended: what it chose is not known.
            return progressed(operation, ahead=()), []
        ranks = seen.cluster.ranks
        is_listened_to = all(slot in ranks or slot in seen.starting for slot in joining)
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
    """The seats that stay, one of each replica, whose ranks tell their load and not that `command` is in force."""
    return [seat for seat in _leading_stayers(operation) if seat.slot in loads and loads[seat.slot].command != command]


def _leading_stayers(operation: Operation) -> list[Seat]:
    """Seats of the leg's new layout that are in the old one too, one of each replica."""
    leg = operation.current_leg()
    joining = {seat.slot for seat in leg.joining}
    return [seat for seat in leg.layout.seats if seat.rank.tp == 0 and seat.slot not in joining]


def end_ahead(operation: Operation, loads: Mapping[int, RankLoad]) -> tuple[list[Action], bool]:
    """Tell all ranks that `move_ahead` may have given a command to get nothing more ready. Returns also whether a rank
    still does. A rank that has not read that command yet reads this one after it."""
    if not operation.current_leg().joining:
        return [], False
    return cancels(operation, _leading_stayers(operation)), _is_told_ahead(operation, loads)


def _is_told_ahead(operation: Operation, loads: Mapping[int, RankLoad]) -> bool:
    """Whether a rank gets sequences ready for this operation's joining ranks, in whichever attempt."""
    commands = [load.command for load in loads.values() if load.command is not None]
    return any((at.op, at.kind) == (operation.op_id, "precopy") for at in commands)


def _is_moving(load: RankLoad) -> bool:
    return load.command is not None and load.command.kind in ("precopy", "migrate")


def cancels(operation: Operation, seats: Iterable[Seat]) -> list[Action]:
    """Let the ranks of these seats hand over nothing more."""
    return [TellRank(seat, CancelMigration(operation.command_id("cancel"))) for seat in seats]


def empty_leavers(operation: Operation, seen: Observation) -> tuple[list[Action], list[Seat]]:
    """Tell leaving ranks to hand over what they have, unless they say that they do. Returns also the seats whose ranks
    are not empty yet. Ranks that leave because their devices are lost have nothing to hand over."""
    leg = operation.current_leg()
    drain = operation.command_id("drain")
    # Members of both layouts take over: a joining rank computes only after the flip.
    joining = {seat.slot for seat in leg.joining}
    stayers = [seat for seat in leg.layout.seats if seat.slot not in joining]
    actions: list[Action] = []
    busy = []
    for seat in leg.leaving if not operation.request.is_lost else ():
        load = seen.loads.get(seat.slot)
        if load is None or not is_empty(load) or load.command != drain or not load.is_leaving:
            busy.append(seat)
        if load is not None and (load.command != drain or not load.is_leaving):
            targets = tuple(MoveTarget(to.rank, to.slot) for to in stayers if to.rank.tp == seat.rank.tp)
            actions.append(TellRank(seat, Drain(drain, targets)))
    return actions, busy


def keep_leaving(operation: Operation, seen: Observation) -> list[Action]:
    """A rank that has left by a layout in force hands over whatever it still gets."""
    return empty_leavers(operation, seen)[0] if operation.plan else []


def is_empty(load: RankLoad) -> bool:
    """Whether the rank has no sequence left, nor one on its way."""
    return load.running + load.waiting + load.moving == 0


def take_back(cancel: CommandId, seats: Iterable[Seat], seen: Observation) -> tuple[Action, ...]:
    """Tell the ranks of these seats that say that they leave to stay."""
    leaving = [seat for seat in seats if seat.slot in seen.loads and seen.loads[seat.slot].is_leaving]
    return tuple(TellRank(seat, CancelMigration(cancel)) for seat in leaving)
