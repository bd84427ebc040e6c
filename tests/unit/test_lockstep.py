"""Ranks that flip to a new layout: at one step, all together, with nothing lost. Real bus, real doorbells, threads."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.protocol.handles import Routing
from elasticmoe.native.bus import Bus, bus_bytes, format_bus
from elasticmoe.services.worker.exchange.base import Exchange, StepAborted
from elasticmoe.services.worker.exchange.shm_barrier import ShmBarrier
from elasticmoe.services.worker.rank.lockstep import HAND_OVER_STEPS, HAND_OVERS_MAX, PUT_OFF_MAX, Lockstep

DEADLINE_S = 20.0
SLOTS = 4


class Member:
    """A rank that computes nothing: what it would compute, in which epoch."""

    def __init__(self, base: int, nbytes: int, slot: int, doorbells: dict[int, int], epochs: tuple[int, ...]) -> None:
        self.bus = Bus(base, nbytes, slot)
        self.bus.join(slot + 1)
        self.slot = slot
        self.steps: list[tuple[int, int]] = []  # (epoch, tokens of all)
        self.aborts = 0
        self.stopping = False
        self.routed: list[int] = []
        self.asked: list[int] = []
        self.is_prepared = True
        self.routings = {epoch: Routing(epoch, ((0,),)) for epoch in epochs}
        self.barrier = ShmBarrier(self.bus, doorbells, slot)
        exchange = SimpleNamespace(set_routing=lambda *args: self.routed.append(args[0]), prepare=self.prepare)
        self.lockstep = Lockstep(self.barrier, cast(Exchange, exchange), self.routings, slot, SYSTEM_CLOCK)
        self.num_tokens = 1
        self.thread = threading.Thread(target=self.run)

    def prepare(self, generation: int) -> bool:
        """See Exchange."""
        self.asked.append(generation)
        return self.is_prepared

    def run(self) -> None:
        while not self.stopping:
            self.lockstep.sync()
            if not (self.lockstep.is_member and (self.num_tokens or self.lockstep.shall_meet())):
                self.bus_wait()
                continue
            try:
                total = self.meet(self.num_tokens)
            except StepAborted:
                self.aborts += 1
                self.lockstep.abort()
                continue
            if total:
                self.steps.append((self.lockstep.epoch, total))

    def meet(self, num_tokens: int, **said: bool) -> int:
        """Wait until all have met; 0 when the test is over before. `said`: see Lockstep.meet."""
        while (total := self.lockstep.meet(num_tokens, **said)) is None:
            if self.stopping:
                return 0
        return total

    def bus_wait(self) -> None:
        """Sleep on the doorbell, as a rank does."""
        ready = threading.Event()
        ready.wait(0.002)
        self.barrier.hear()


class Harness:
    """The segment, its members and the HMM's view."""

    def __init__(self) -> None:
        self.nbytes = bus_bytes(SLOTS, 8, 16, 2)
        self.segment = mmap.mmap(-1, self.nbytes)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.segment))
        format_bus(self.base, self.nbytes, SLOTS, 8, 16, 2)
        self.hmm = Bus(self.base, self.nbytes)
        self.doorbells = {slot: os.eventfd(0, os.EFD_NONBLOCK) for slot in range(SLOTS)}
        self.members: list[Member] = []

    def add(self, slot: int, *epochs: int) -> Member:
        member = Member(self.base, self.nbytes, slot, dict(self.doorbells), epochs)
        self.members.append(member)
        return member

    def wait(self, test: Any, what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not test():
            assert time.monotonic() < deadline, f"{what} did not come"
            threading.Event().wait(0.001)

    def close(self) -> None:
        for member in self.members:
            member.stopping = True
        generation = max(self.hmm.membership()[0], self.hmm.staged()[0]) + 1
        self.hmm.set_membership(generation, 0, False, 0)
        for member in self.members:
            if member.thread.is_alive():
                member.thread.join(DEADLINE_S)
                assert not member.thread.is_alive()
        for fd in self.doorbells.values():
            os.close(fd)


@pytest.fixture
def harness() -> Iterator[Harness]:
    made = Harness()
    yield made
    made.close()


def test_nobody_flips_before_all_are_prepared(harness: Harness) -> None:
    """Who comes in is asked, too, before it is a member."""
    members, joiner = [harness.add(0, 1, 2), harness.add(1, 1, 2)], harness.add(2, 1, 2)
    members[1].is_prepared = False
    harness.hmm.set_membership(1, 0b011, True, 1)
    for member in (*members, joiner):
        member.thread.start()
    harness.hmm.stage_membership(2, 0b111, 2)
    harness.wait(lambda: all(2 in member.asked for member in (*members, joiner)), "all are asked")
    num_steps = len(members[0].steps)
    harness.wait(lambda: len(members[0].steps) > num_steps + 50, "steps go on meanwhile")
    assert harness.hmm.membership()[0] == 1
    members[1].is_prepared = True
    harness.wait(lambda: len(joiner.steps) > 10, "steps of epoch 2")
    assert harness.hmm.membership()[0] == 2


def test_two_members_take_in_a_third_and_let_one_go_without_losing_a_step(harness: Harness) -> None:
    members = [harness.add(0, 1, 2, 3), harness.add(1, 1, 2, 3)]
    joiner = harness.add(2, 1, 2, 3)
    harness.hmm.set_membership(1, 0b011, True, 1)
    for member in (*members, joiner):
        member.thread.start()
    harness.wait(lambda: len(members[0].steps) > 50, "steps of epoch 1")
    assert joiner.steps == []
    harness.hmm.stage_membership(2, 0b111, 2)
    harness.wait(lambda: len(joiner.steps) > 50, "steps of epoch 2")
    assert harness.hmm.membership() == (2, 0b111, True, 2)
    harness.hmm.stage_membership(3, 0b101, 3)  # slot 1 leaves
    harness.wait(lambda: members[0].steps[-1][0] == 3 and len(members[0].steps) > 200, "steps of epoch 3")
    harness.wait(lambda: not members[1].lockstep.is_member, "the leaver's notice")
    for member in members:
        # Every step that was computed in an epoch had all of its members: nobody computed while others had flipped.
        assert {epoch: {total for e, total in member.steps if e == epoch} for epoch, _ in member.steps} == {
            epoch: {{1: 2, 2: 3, 3: 2}[epoch]} for epoch, _ in member.steps
        }
    assert [total for epoch, total in members[1].steps if epoch == 3] == []
    assert len([s for s in members[0].steps if s[0] == 1]) == len([s for s in members[1].steps if s[0] == 1])


def test_idle_members_flip_too(harness: Harness) -> None:
    members = [harness.add(0, 1, 2), harness.add(1, 1, 2)]
    for member in members:
        member.num_tokens = 0
    harness.hmm.set_membership(1, 0b11, True, 1)
    for member in members:
        member.thread.start()
    harness.wait(lambda: all(m.lockstep.epoch == 1 and not m.lockstep.is_awake for m in members), "sleep")
    harness.hmm.stage_membership(2, 0b11, 2)
    harness.wait(lambda: all(member.lockstep.epoch == 2 for member in members), "the flip")


def test_nobody_flips_before_everyone_is_ready(harness: Harness) -> None:
    ready, late = harness.add(0, 1, 2), harness.add(1, 1)
    harness.hmm.set_membership(1, 0b11, True, 1)
    for member in (ready, late):
        member.thread.start()
    harness.hmm.stage_membership(2, 0b11, 2)
    seen = len(ready.steps)
    harness.wait(lambda: len(ready.steps) > seen + 200, "steps of the old epoch")
    assert harness.hmm.membership()[3] == 1
    late.routings[2] = Routing(2, ((0,),))
    harness.wait(lambda: ready.lockstep.epoch == late.lockstep.epoch == 2, "the flip")


def test_a_parked_generation_makes_the_staged_one_void(harness: Harness) -> None:
    members = [harness.add(0, 1, 2), harness.add(1, 1)]  # the second is never ready
    harness.hmm.set_membership(1, 0b11, True, 1)
    for member in members:
        member.thread.start()
    harness.hmm.stage_membership(2, 0b11, 2)
    harness.wait(lambda: len(members[0].steps) > 20, "steps")
    harness.hmm.set_membership(3, 0b11, False, 2)
    harness.wait(lambda: not any(member.lockstep.is_member for member in members), "the halt")
    assert harness.hmm.staged() == (0, 0, 0)
    members[1].routings[2] = Routing(2, ((0,),))
    harness.hmm.set_membership(4, 0b11, True, 2)
    harness.wait(lambda: all(member.lockstep.epoch == 2 for member in members), "the new generation")


def urgency(member: Member, num_steps: int) -> list[bool]:
    """Of the next steps; each is met for."""
    seen = []
    for _ in range(num_steps):
        seen.append(member.lockstep.is_urgent)
        assert member.meet(1) > 0
    return seen


def test_steps_that_somebody_waits_for_are_urgent_and_bounded_in_number(harness: Harness) -> None:
    one, other = (harness.add(slot, 1, 2) for slot in (0, 1))
    harness.hmm.set_membership(1, 0b01, True, 1)
    one.lockstep.sync()
    assert urgency(one, 4) == [True, True, True, False]  # ranks came in
    harness.hmm.set_membership(2, 0b01, True, 1)
    one.lockstep.sync()
    assert urgency(one, 2) == [True, False]  # one was replaced
    one.lockstep.hurry(2)
    assert urgency(one, 3) == [True, True, False]

    harness.hmm.set_membership(3, 0b11, True, 1)
    for member in (one, other):
        member.lockstep.sync()
    other.routings.pop(2)  # it learns of the next layout late
    met = threading.Thread(target=lambda: [other.meet(1) for _ in range(6)])
    met.start()
    urgency(one, 3)
    harness.hmm.stage_membership(4, 0b11, 2)
    assert urgency(one, 3) == [True, True, False]
    met.join(DEADLINE_S)


def test_prompts_that_urgent_steps_have_put_off_come_a_few_at_a_time_for_as_long(harness: Harness) -> None:
    member = harness.add(0, 1)
    harness.hmm.set_membership(1, 0b01, True, 1)
    member.lockstep.sync()

    def catching_up(num_steps: int, *, has_prompts: bool = True) -> list[bool]:
        seen = []
        for _ in range(num_steps):
            seen.append(member.lockstep.is_catching_up)
            assert member.meet(1, puts_off=has_prompts and member.lockstep.is_urgent) > 0
        return seen

    assert catching_up(8) == [False] * 3 + [True] * 3 + [False] * 2  # the first steps are urgent
    member.lockstep.hurry(2 * PUT_OFF_MAX)
    assert catching_up(3 * PUT_OFF_MAX + 2) == [False] * 2 * PUT_OFF_MAX + [True] * PUT_OFF_MAX + [False] * 2
    member.lockstep.hurry(6)
    assert catching_up(8, has_prompts=False) == [False] * 8, "nothing was put off"
    member.lockstep.hurry(4)
    assert catching_up(2, has_prompts=False) == [False] * 2
    assert catching_up(5) == [False] * 2 + [True] * 2 + [False], "two were without prompts"
    member.lockstep.hurry(2)
    assert catching_up(3) == [False, False, True]
    assert member.meet(0) == 0
    assert not member.lockstep.is_catching_up, "nobody has work"


def test_while_a_sequence_moves_all_ranks_steps_are_urgent(harness: Harness) -> None:
    one, other = (harness.add(slot, 1) for slot in (0, 1))
    harness.hmm.set_membership(1, 0b11, True, 1)
    for member in (one, other):
        member.lockstep.sync()

    def met(tokens: tuple[int, int], *, is_handing: bool = False) -> tuple[int, int, list[bool]]:
        """Both step; what each takes for the total, and whether the next step is urgent for each."""
        totals: list[int] = []
        thread = threading.Thread(target=lambda: totals.append(other.meet(tokens[1])))
        thread.start()
        total = one.meet(tokens[0], is_handing=is_handing)
        thread.join(DEADLINE_S)
        return total, totals[0], [member.lockstep.is_urgent for member in (one, other)]

    for _ in range(4):
        met((1, 1))  # the first steps of the generation
    assert met((5, 7), is_handing=True) == (12, 12, [True, True])  # what is said besides is no token
    assert met((5, 7)) == (12, 12, [True, True])
    assert met((5, 7)) == (12, 12, [False, False])
    # Hand-overs one after another: at last prompts have a step as well.
    seen = [met((1, 1), is_handing=True)[2][1] for _ in range(HAND_OVERS_MAX + HAND_OVER_STEPS + 1)]
    assert seen == [True] * (HAND_OVERS_MAX + HAND_OVER_STEPS - 1) + [False, True]
    met((0, 0), is_handing=True)
    assert [member.lockstep.is_urgent for member in (one, other)] == [False, False], "nobody has work"


def test_a_step_alone_is_told_from_what_is_said_of_hand_overs(harness: Harness) -> None:
    member = harness.add(0, 1)
    harness.hmm.set_membership(1, 0b01, True, 1)
    member.lockstep.sync()
    assert member.meet(9, is_alone=True, is_handing=True) == 9
    assert member.lockstep.has_turn


def test_a_first_step_that_nobody_has_work_for_leaves_no_urgency(harness: Harness) -> None:
    member = harness.add(0, 1)
    harness.hmm.set_membership(1, 0b01, True, 1)
    member.lockstep.sync()
    assert member.meet(0) == 0
    assert not member.lockstep.is_urgent
    assert not member.lockstep.is_awake
    member.lockstep.hurry(6)  # nobody has work: there is nothing to be in a hurry with
    assert urgency(member, 3) == [False, False, False]


def test_only_who_is_a_member_for_the_first_time_has_come_in(harness: Harness) -> None:
    one, other = (harness.add(slot, 1) for slot in (0, 1))
    harness.hmm.set_membership(1, 0b01, True, 1)
    for member in (one, other):
        member.lockstep.sync()
    assert one.lockstep.has_come_in
    assert not other.lockstep.has_come_in
    one.lockstep.abort()
    harness.hmm.set_membership(2, 0b11, True, 1)
    for member in (one, other):
        member.lockstep.sync()
    assert not one.lockstep.has_come_in
    assert other.lockstep.has_come_in


def test_a_members_successor_does_not_know_that_nobody_is_in_its_last_step_until_all_have_met(harness: Harness) -> None:
    """One that joins has no step behind it that anybody may be in."""
    harness.hmm.set_membership(1, 0b011, True, 1)
    one = harness.add(0, 1)
    harness.hmm.set_membership(2, 0b011, False, 1)  # it dies
    heir, other, joiner = harness.add(0, 1), harness.add(1, 1), harness.add(2, 1)
    assert joiner.lockstep.is_settled
    harness.hmm.set_membership(3, 0b011, True, 1)
    for member in (heir, other):
        member.lockstep.sync()
        assert not member.lockstep.is_settled
    met = threading.Thread(target=other.meet, args=(1,))
    met.start()
    heir.meet(1)
    met.join(DEADLINE_S)
    assert heir.lockstep.is_settled
    assert other.lockstep.is_settled
    assert one.lockstep.generation == 0


def test_who_first_sees_a_generation_that_does_not_run_comes_in_with_the_next(harness: Harness) -> None:
    member = harness.add(0, 1)
    harness.hmm.set_membership(1, 0b01, False, 1)
    member.lockstep.sync()
    assert not member.lockstep.has_come_in
    harness.hmm.set_membership(2, 0b01, True, 1)
    member.lockstep.sync()
    assert member.lockstep.has_come_in


def test_a_member_that_asks_for_it_has_the_step_for_itself(harness: Harness) -> None:
    """Of several the one in the lowest slot; all know whose tokens count, and nobody's but those."""
    members = [harness.add(slot, 1) for slot in range(3)]
    harness.hmm.set_membership(1, 0b111, True, 1)
    said: dict[int, list[tuple[int, bool, int]]] = {0: [], 1: [], 2: []}

    def meet(member: Member, asks: tuple[bool, ...]) -> None:
        lockstep = member.lockstep
        lockstep.sync()
        for number, is_alone in enumerate(asks):
            total = member.meet(10 * member.slot + number, is_alone=is_alone)
            lockstep.note_done()
            said[member.slot].append((total, lockstep.has_turn, lockstep.num_clean))

    asks = {0: (False, False, False, True), 1: (False, True, False, True), 2: (False, True, False, False)}
    for member in members:
        member.thread = threading.Thread(target=meet, args=(member, asks[member.slot]))
        member.thread.start()
    for member in members:
        member.thread.join(DEADLINE_S)
    everybodys = [(30, True, 1), (11, False, 0), (36, True, 2), (3, False, 0)]
    for slot, turn in ((0, 3), (1, 1), (2, None)):
        assert said[slot] == [
            (total, has_turn or number == turn, clean) for number, (total, has_turn, clean) in enumerate(everybodys)
        ]
    lockstep = members[0].lockstep
    lockstep.note_failed()
    assert lockstep.num_clean == 0
    harness.hmm.set_membership(2, 0b111, True, 1)
    lockstep.sync()
    assert lockstep.num_clean == 0


def test_a_new_generation_knows_of_no_completed_steps(harness: Harness) -> None:
    member = harness.add(0, 1)
    harness.hmm.set_membership(1, 0b1, True, 1)
    member.lockstep.sync()
    assert member.meet(1) == 1
    member.lockstep.note_done()
    assert member.lockstep.num_clean == 1
    harness.hmm.set_membership(2, 0b1, True, 1)
    member.lockstep.sync()
    assert member.lockstep.num_clean == 0
