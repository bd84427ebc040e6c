"""Stories of an operation as transcripts. A line is a turn of the scaler,

    what is seen -> what is done | leg and phase: reason

and `* what happens` between two lines happens before the next turn. What is seen: the transition of the HMM, and each
rank's slot and sequences (`1:2`, with `~` where it leaves), or who does not answer. A turn that is like the one before
it is not told again. See `EVENTS` for what can happen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import msgspec

from elasticmoe.common.protocol.hmm import AbortLayout, CommitLayout, ReleaseLayout, SetMembership
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.services.scaler.actions import Action, StopSeat, TellRank
from elasticmoe.services.scaler.control.reconciler import advance
from elasticmoe.services.scaler.operation.operation import Operation, cancel, without_lost
from tests.unit.transitions import KINDS, World

TURNS_MAX = 400


def _stage_fails(world: World, operation: Operation, code: str) -> Operation:
    error = Refused(code, "no memory") if code else None
    world.transition = msgspec.structs.replace(world.transition, phase="failed", error=error)
    return operation


def _aborted(world: World, operation: Operation, _: str) -> Operation:
    world.transition = msgspec.structs.replace(world.transition, phase="aborted")
    return operation


def _cancelled(_: World, operation: Operation, __: str) -> Operation:
    return cancel(operation)


def _lost(_: World, operation: Operation, device: str) -> Operation:
    return without_lost(operation, (device,))


def _set(**fields: object) -> Callable[[World, Operation, str], Operation]:
    def change(world: World, operation: Operation, _: str) -> Operation:
        for name, value in fields.items():
            setattr(world, name, value)
        return operation

    return change


def _goes_on(world: World, operation: Operation, _: str) -> Operation:
    del world.progress  # what hid the method
    return operation


def _no_room(world: World, operation: Operation, why: str) -> Operation:
    world.is_durable, world.no_room = False, why
    return operation


def _ends(world: World, operation: Operation, slot: str, how: str) -> Operation:
    world.end(int(slot))
    world.exits = {int(slot): how}
    return operation


def _refused(world: World, operation: Operation, code: str) -> Operation:
    world.refused = Refused(code, "says the HMM", code == "busy") if code else None
    return operation


def _later(world: World, operation: Operation, seconds: str) -> Operation:
    world.now += float(seconds)
    return operation


EVENTS: dict[str, Callable[..., Operation]] = {
    r"()an operator cancels it": _cancelled,
    r"device (\S+) is lost": _lost,
    r"slot (\d) ends: (.*)": _ends,
    r"staging fails: ?(\w*)": _stage_fails,
    r"staging is refused: ?(\w*)": _refused,
    r"()the HMM has aborted the transition": _aborted,
    r"()the HMM forgets the transition": _set(transition=None),
    r"()the store takes nothing": _set(is_durable=False),
    r"the store has no room: (.*)": _no_room,
    r"()the store takes everything": _set(is_durable=True, no_room=""),
    r"()the pool is away": _set(pool_answers=False),
    r"()the pool is back": _set(pool_answers=True),
    r"()nobody heeds commands": _set(_tell=lambda _: None),
    r"()nothing goes on": _set(progress=lambda: None),
    r"()all goes on": _goes_on,
    r"(\d+) s pass": _later,
}


def play(world: World, operation: Operation, transcript: str) -> Operation:
    """Carry `operation` on as the transcript says; the operation after its last line. Fails with what came instead."""
    came: list[str] = []
    turns = _turns(world, operation, came)
    next(turns)
    for line in filter(None, (" ".join(line.split()) for line in transcript.splitlines())):
        if line.startswith("* "):
            came.append(line)
            turns.send(line)
            continue
        for _ in range(TURNS_MAX):
            operation, told = next(turns)
            if came[-1:] != [told]:
                break
        came.append(told)
        assert told == line, _differs(transcript, came)
    return operation


def _turns(world: World, operation: Operation, came: list[str]) -> Iterator[tuple[Operation, str]]:
    """Turn after turn; what is sent happens between them."""
    event = yield operation, ""
    is_first = True
    while True:
        if not is_first:
            world.progress()
        while event is not None:
            operation = _happens(world, operation, event.removeprefix("* "))
            event = yield operation, ""
        is_first = False
        seen = _seen(world)
        step = advance(operation, world.seen(), world.now)
        for action in step.actions:
            world.obey(action)
        operation = step.state
        told = f"{seen} -> {done(step.actions)} | {operation.leg + 1} {operation.phase}: {operation.why}"
        event = yield operation, told


def _happens(world: World, operation: Operation, event: str) -> Operation:
    for pattern, change in EVENTS.items():
        if (found := re.fullmatch(pattern, event)) is not None:
            return change(world, operation, *found.groups())
    raise AssertionError(f"no such event: {event}")


def _seen(world: World) -> str:
    hmm = world.transition.phase if world.transition is not None else "no transition"
    ranks = [f"{slot}:{world.running.get(slot, 0)}{'~' * (slot in world.leaving)}" for slot in sorted(world.ranks)]
    return " ".join([hmm if world.hmm_answers else "no HMM", *(ranks if world.pool_answers else ["no pool"])])


def done(actions: Iterable[Action]) -> str:
    """What is done, in words."""
    return ", ".join(map(_told, actions)) or "nothing"


def _told(action: Action) -> str:
    if isinstance(action, SetMembership):
        return f"SetMembership {action.slots} {'running' if action.running else 'parked'}"
    if not isinstance(action, TellRank):
        what = getattr(action, "seat", None)
        whom = what.rank if what is not None else action.incarnation if isinstance(action, StopSeat) else ""
        name = type(action).__name__
        is_transition = isinstance(action, CommitLayout | ReleaseLayout | AbortLayout)
        return f"{name.removesuffix('Layout') if is_transition else name} {whom}".strip()
    targets = getattr(action.command, "targets", ())
    to = "".join(f" {target.num_sequences}>{target.slot}" for target in targets)
    return f"{KINDS[type(action.command)]} {action.seat.rank}{to}"


def _differs(transcript: str, came: list[str]) -> str:
    return f"the transcript says\n{transcript}\nand it came to\n" + "\n".join(came)
