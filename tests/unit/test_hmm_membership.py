"""The HMM's writes to the bus: published, staged, overtaken by a rank's flip, and parked."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.layout import Layout, initial_layout
from elasticmoe.common.seat_sizes import BusSizes
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.hmm.memory.memory import BusSegment
from elasticmoe.services.hmm.sessions.membership import Membership, slots_of_mask

BEFORE = initial_layout((4,), ["host:0", "host:1"])
AFTER = msgspec.structs.replace(initial_layout((4,), ["host:0", "host:1", "host:2"]), epoch=2)


class World:
    """A bus, and the layout in force."""

    def __init__(self) -> None:
        self.segment = BusSegment(HostShared.create("bus"))
        self.segment.format(BusSizes(8, 4, 8, 2, 0, 0, 1 << 20))
        self.num_rings = 0
        self.holdings: Any = SimpleNamespace(
            segment=self.segment, loaded=SimpleNamespace(layout=BEFORE), ring=self._ring
        )
        self.subject = Membership(self.holdings, get_logger("test"))

    def _ring(self) -> None:
        self.num_rings += 1

    @property
    def bus(self) -> Any:
        return self.segment.bus

    def commit(self, layout: Layout) -> None:
        self.holdings.loaded = SimpleNamespace(layout=layout)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.segment.close()


def test_a_staged_layout_is_flipped_to(world: World) -> None:
    world.subject.publish((0, 1), True)
    assert world.subject.current() == (1, 3, True, 1)
    world.commit(AFTER)
    world.subject.stage(AFTER)
    world.subject.stage(AFTER)  # as after a restart
    assert world.bus.staged() == (2, 7, 2)
    assert not world.subject.has_flipped(AFTER)
    assert world.bus.flip(2)
    assert world.subject.has_flipped(AFTER)
    world.subject.stage(AFTER)
    assert world.bus.staged() == (0, 0, 0)
    assert world.num_rings == 2


def test_nothing_is_staged_where_nobody_runs(world: World) -> None:
    world.subject.stage(AFTER)
    world.subject.publish((0, 1), False)
    world.subject.stage(AFTER)
    assert world.bus.staged() == (0, 0, 0)


@pytest.mark.parametrize("slot", [0, 2])
def test_the_end_of_a_member_or_of_one_to_be_parks_and_voids_what_is_staged(world: World, slot: int) -> None:
    world.subject.publish((0, 1), True)
    world.commit(AFTER)
    world.subject.stage(AFTER)
    world.subject.park(5)
    assert world.subject.current()[2]
    world.subject.park(slot)
    assert world.subject.current() == (3, 3, False, 2)
    assert not world.bus.flip(2)
    world.subject.park(slot)
    assert world.subject.current()[0] == 3
    world.subject.publish((0, 1, 2), True)
    assert world.subject.current() == (4, 7, True, 2)


def test_a_flip_that_comes_in_between_is_written_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.subject.publish((0, 1), True)
    bus, refused = world.bus, []

    class Overtaken:
        """The bus, on which a rank is quicker than the first write."""

        def set_membership(self, generation: int, *rest: Any) -> None:
            if not refused:
                bus.stage_membership(generation + 1, 7, 2)
                assert bus.flip(generation + 1)
                refused.append(generation)
            bus.set_membership(generation, *rest)

        def __getattr__(self, name: str) -> Any:
            return getattr(bus, name)

    monkeypatch.setattr(world.segment, "bus", Overtaken())
    world.subject.park(1)
    assert refused == [2]
    assert bus.membership() == (4, 7, False, 1)


def test_without_a_model_there_is_no_membership(world: World) -> None:
    world.holdings.loaded = None
    assert world.subject.current() == (0, 0, False, 0)
    assert world.subject.max_ranks == 0
    world.subject.park(0)
    world.subject.stage(AFTER)
    assert slots_of_mask(0b101) == (0, 2)
