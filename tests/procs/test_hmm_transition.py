"""The HMM's side of transitions, with real HMM and keeper processes: layouts are staged, committed, released and given
up while the test plays the scaler and the ranks.

Longer than other files because all of it shares one set of fixtures: a model on two of three devices, and its ranks.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from elasticmoe.common.layout import Layout, RankId, Seat, initial_layout
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.handles import Applied
from elasticmoe.common.protocol.hmm import (
    AbortLayout,
    CommitLayout,
    CopyBlocks,
    RecordCopy,
    ReleaseLayout,
    StageLayout,
)
from elasticmoe.common.protocol.ids import TransitionId
from elasticmoe.common.protocol.replies import Ack
from elasticmoe.common.protocol.scaler import HmmStatus, TransitionStatus
from elasticmoe.services.hmm.memory.catalog import keys_of
from tests.procs.hmm_harness import Deployment, Rank, load_message
from tests.procs.waiting import processes_of, wait_until

pytestmark = pytest.mark.procs

KV_HANDLES = 3  # of each device at the load; one sequence of full length needs one
OP_2, OP_3 = TransitionId("op-2"), TransitionId("op-3")  # named by the epochs that they lead to
SLOW = 1 << 20  # bytes per second: a new seat's memory takes seconds


class World:
    """A loaded deployment with its ranks attached and running."""

    def __init__(self, model: Path, slots: tuple[int, ...], **settings: Any) -> None:
        self.deployment = Deployment(**{"devices": "host:3", "device_bytes": 32 << 20} | settings)
        self.deployment.start_keeper()
        self.deployment.start_hmm()
        layout = initial_layout((5, 5), [f"host:{slot}" for slot in slots])
        self.deployment.load(model, layout=layout, kv_bytes_max=KV_HANDLES << 21)
        self.ranks = {slot: Rank(self.deployment, slot) for slot in slots}
        self.deployment.members(*slots)
        self.before = self.status()
        self.sums = self.deployment.integrity(checksums=True).checksums

    def status(self) -> HmmStatus:
        """The HMM's status; its catalog, its devices and its bookkeeping of real memory are verified."""
        status = self.deployment.status()
        assert self.deployment.integrity().findings == ()
        return status

    def transition(self) -> TransitionStatus:
        transition = self.status().transition
        assert transition is not None
        return transition

    def call(self, message: Any) -> None:
        assert isinstance(self.deployment.call(message), Ack)

    def request(self, slots: tuple[int, ...], **changes: Any) -> StageLayout:
        """From the layout in force to one on `slots`, experts spread evenly; a KV handle fewer until the release."""
        status = self.deployment.status()
        before = status.layout
        assert before is not None
        homes = tuple(tuple((slots[(expert + layer) % len(slots)],) for expert in range(5)) for layer in range(2))
        seats = tuple(Seat(RankId(slot, 0), slot, f"host:{slot}") for slot in slots)
        layout = Layout(before.epoch + 1, 1, seats, homes)
        handles = {device.device: device.kv // (2 << 20) for device in status.devices}
        old, new = {seat.device for seat in before.seats}, {seat.device for seat in seats}
        request = StageLayout(
            TransitionId(f"op-{layout.epoch}"),
            layout,
            copies_of(before, layout),
            {name: handles[name] - 1 if name in old else 1 for name in old | new},
            dict.fromkeys(new, KV_HANDLES),
        )
        return msgspec.structs.replace(request, **changes)

    def slow_request(self) -> StageLayout:
        """To three devices, with all KV of the third from the start: it is copied to for longer than a busy machine may
        stop the test, and what an abort gives back does not take longer for that."""
        request = self.request((0, 1, 2), bytes_per_s_max=SLOW)
        return msgspec.structs.replace(request, kv_handles=request.kv_handles | {"host:2": KV_HANDLES})

    def wait(self, phase: str, *, following: bool = True) -> TransitionStatus:
        """Wait for a phase, while the ranks do what the HMM tells them."""

        def reached() -> TransitionStatus | None:
            for rank in self.ranks.values() if following else ():
                rank.follow()
            transition = self.deployment.status().transition
            assert transition is not None
            assert transition.phase != "failed" or phase == "failed", transition.error
            return transition if transition.phase == phase else None

        wait_until(reached, f"phase {phase}")
        return self.transition()

    def wait_prepared(self, *slots: int) -> None:
        def prepared() -> bool:
            for rank in self.ranks.values():
                rank.follow()
            return set(slots) <= set(self.transition().prepared)

        wait_until(prepared, f"slots {slots} are prepared")

    def join(self, slot: int) -> Rank:
        self.ranks[slot] = Rank(self.deployment, slot)
        return self.ranks[slot]

    def flip(self, slot: int = 0) -> None:
        bus = self.ranks[slot].bus
        assert bus.flip(bus.staged()[0])

    def restart(self) -> None:
        """kill -9, and a new HMM, to which the living ranks introduce themselves."""
        self.deployment.kill_hmm()
        self.deployment.start_hmm()
        for rank in self.ranks.values():
            rank.resume(self.deployment)

    def check_memory(self) -> None:
        """At rest: every page belongs to a handle, every home has the bytes that were loaded, and ranks see them."""
        status = self.status()
        for device in status.devices:
            assert device.pages == device.weights + device.kv, device
        sums = self.deployment.integrity(checksums=True).checksums
        by_key = {name.split("/")[1]: value for name, value in self.sums.items()}
        assert {name.split("/")[1] for name in sums} == set(by_key)
        assert all(value == by_key[name.split("/")[1]] for name, value in sums.items())
        mine: dict[str, int] = {}
        for rank in self.ranks.values():
            mine |= rank.checksums()
            assert len(rank.kv) * (2 << 20) == status.devices[rank.request.slot].kv
        assert mine == sums

    def check_undone(self) -> None:
        """Not one page more, nor less, than before the transition."""
        status = self.status()
        # Large pages are made in the background.
        now, before = (
            [msgspec.structs.replace(device, attached=None, large_pages=0) for device in told.devices]
            for told in (status, self.before)
        )
        assert now == before
        assert status.layout == self.before.layout

    def close(self) -> None:
        for rank in self.ranks.values():
            rank.close()
        self.deployment.close()
        assert processes_of(self.deployment.run_dir) == {}


def copies_of(before: Layout, after: Layout) -> tuple[RecordCopy, ...]:
    """What `after` needs and `before` does not have, each from the first device that holds it."""
    held = {seat.device: keys_of((before,), seat.device) for seat in before.seats}
    return tuple(
        RecordCopy(key, next(device for device, keys in held.items() if key in keys), seat.device)
        for seat in after.seats
        for key in sorted(keys_of((after,), seat.device) - held.get(seat.device, set()))
    )


@pytest.fixture
def make(tiny_mixtral: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def world(*slots: int, **settings: Any) -> World:
        made.append(World(tiny_mixtral, slots, **settings))
        return made[-1]

    yield world
    for one in made:
        one.close()


@pytest.fixture
def world(make: Callable[..., World]) -> World:
    return make(0, 1)


# ---- The whole way


def test_a_device_joins_and_another_leaves(world: World) -> None:
    request = world.request((0, 1, 2))
    world.call(request)
    staged = world.wait("staged")
    assert (staged.id, staged.epoch, staged.error) == (OP_2, 2, None)
    assert 0 < staged.bytes_done == staged.bytes_total
    joiner = world.join(2)
    assert joiner.seat.slots == world.ranks[0].seat.slots == (0, 1, 2)
    assert [routing.epoch for routing in joiner.seat.routings] == [1, 2]
    assert joiner.ledger.rows() == []
    world.wait_prepared(0, 1, 2)
    world.call(CommitLayout(OP_2))
    status = world.status()
    assert status.layout == request.layout
    assert (status.members, status.transition and status.transition.phase) == ((0, 1), "committed")
    assert world.ranks[1].bus.staged()[1:] == (7, 2)
    assert all(rank.is_rung() for rank in world.ranks.values())
    assert world.deployment.refusal(ReleaseLayout(OP_2)) == "not_flipped"
    world.flip()
    assert world.transition().phase == "flipped"
    world.call(ReleaseLayout(OP_2))
    released = world.wait("released")
    world.wait_prepared(0, 1, 2)
    world.check_memory()
    for device in world.status().devices:
        assert device.kv == KV_HANDLES * (2 << 20)
        assert released.peak_pages[device.device] >= device.pages
    assert [routing.epoch for routing in joiner.seat.routings] == [2]

    world.call(world.request((1, 2)))  # any replica may leave
    world.wait("staged")
    world.wait_prepared(1, 2)
    world.call(CommitLayout(OP_3))
    world.flip(1)
    world.call(ReleaseLayout(OP_3))
    wait_until(lambda: world.deployment.status().devices[1].weights > 0, "an answer")
    for rank in world.ranks.values():
        rank.follow()
    assert world.transition().phase == "releasing"  # as long as the rank that leaves has its memory mapped
    leaver = world.ranks.pop(0)
    leaver.close()
    world.wait("released")
    world.wait_prepared(1, 2)
    assert world.ranks[1].bus.membership() == (3, 6, True, 3)  # its end stopped nobody
    world.check_memory()
    empty = world.status().devices[0]
    assert (empty.pages, empty.free) == (0, empty.budget)
    assert world.ranks[2].seat.slots == (1, 2)


def test_records_that_no_device_offers_come_from_disk(world: World) -> None:
    request = world.request((0, 1, 2))
    copies = tuple(msgspec.structs.replace(copy, source="") for copy in request.copies)
    world.call(msgspec.structs.replace(request, copies=copies))
    world.wait("staged")
    joiner = world.join(2)
    world.wait_prepared(0, 1, 2)
    sums = {name.split("/")[1]: value for name, value in world.sums.items()}
    assert joiner.checksums() == {f"host:2/{key}": sums[str(key)] for key in joiner.records}


def test_kv_goes_only_when_its_rank_has_cleared_it(world: World) -> None:
    first, second = world.ranks.values()
    world.call(world.request((0, 1, 2)))
    seat, fds = first.next_seat()
    assert len(seat.kv) == KV_HANDLES - 1
    assert seat.kv == first.seat.kv[:-1]
    second.follow()
    wait_until(lambda: world.status().devices[1].kv == (KV_HANDLES - 1) << 21, "the HMM takes it back")
    assert world.transition().phase == "vacating"
    assert world.status().devices[0].kv == KV_HANDLES << 21
    first.write_block(0, b"kept")
    first.apply(seat, fds)
    world.wait("staged")
    assert first.block(0)[:4] == b"kept"
    assert world.status().devices[0].kv == (KV_HANDLES - 1) << 21


def test_a_replacement_that_comes_while_kv_is_vacated_gets_all_of_it_first(world: World) -> None:
    world.call(world.request((0, 1, 2)))
    world.ranks[1].follow()
    world.ranks[0].close()
    wait_until(lambda: world.deployment.status().devices[0].attached is None, "the rank is detached")
    assert world.transition().phase == "vacating"
    replacement = world.join(0)
    assert len(replacement.kv) == KV_HANDLES
    world.wait("staged")
    assert len(replacement.kv) == KV_HANDLES - 1


# ---- Refusals


def test_what_cannot_be_is_refused_and_changes_nothing(world: World) -> None:
    good = world.request((0, 1, 2))
    assert good.layout.epoch == 2

    def layout(**changes: Any) -> dict[str, Any]:
        return {"layout": msgspec.structs.replace(good.layout, **changes)}

    moved = (Seat(RankId(0, 0), 0, "host:0"), Seat(RankId(1, 0), 2, "host:1"), Seat(RankId(2, 0), 1, "host:2"))
    foreign = (*good.layout.seats[:2], Seat(RankId(2, 0), 2, "host:9"))
    high = (*good.layout.seats[:2], Seat(RankId(2, 0), 63, "host:2"))
    split = tuple(Seat(RankId(0, tp), seat.slot, seat.device) for tp, seat in enumerate(good.layout.seats))
    homes = tuple(tuple((0,) for _ in range(5)) for _ in range(2))
    cases: list[tuple[dict[str, Any], str]] = [
        (layout(epoch=1), "wrong_epoch"),
        (layout(epoch=3), "wrong_epoch"),
        (layout(tp=3), "invalid_request"),
        (layout(tp=3, seats=split), "tp_unsupported"),
        (layout(seats=moved), "invalid_request"),
        (layout(seats=foreign), "not_found"),
        (layout(seats=high, homes=homes), "invalid_request"),
        (layout(homes=homes[:1]), "invalid_request"),
        ({"copies": good.copies[1:]}, "invalid_request"),
        ({"copies": (*good.copies, good.copies[0])}, "invalid_request"),
        ({"copies": (*good.copies, RecordCopy(RecordKey("base"), "host:1", "host:0"))}, "invalid_request"),
        ({"copies": (RecordCopy(good.copies[0].key, "host:2", "host:2"), *good.copies[1:])}, "invalid_request"),
        ({"kv_handles": {"host:0": 1}}, "invalid_request"),
        ({"kv_handles": good.kv_handles | {"host:0": 0}}, "does_not_fit"),
        ({"kv_handles": good.kv_handles | {"host:0": KV_HANDLES + 1}}, "invalid_request"),
        ({"kv_handles_after": good.kv_handles_after | {"host:0": 1}}, "invalid_request"),
        (
            {
                "kv_handles": good.kv_handles | {"host:2": 16},
                "kv_handles_after": good.kv_handles_after | {"host:2": 16},
            },
            "does_not_fit",
        ),
        ({"kv_handles_after": good.kv_handles_after | {"host:0": 16}}, "does_not_fit"),
    ]
    for changes, code in cases:
        assert world.deployment.refusal(msgspec.structs.replace(good, **changes)) == code, changes
    for message in (CommitLayout(OP_2), ReleaseLayout(OP_2), AbortLayout(OP_2)):
        assert world.deployment.refusal(message) == "not_found"
    assert world.status().transition is None
    world.check_undone()


def test_the_figures_of_a_plan_that_does_not_fit_are_given(world: World) -> None:
    request = world.request((0, 1, 2), kv_handles_after={"host:0": 16, "host:1": 3, "host:2": 3})
    with pytest.raises(ElasticMoEError, match=r"budget of 32\.0 MiB, .*; 16 KV handles .* exceed it by 204 KiB"):
        world.deployment.call(request)


def test_a_superseded_scaler_is_refused(world: World) -> None:
    world.deployment.members(0, 1, epoch=5)
    for message in (world.request((0, 1, 2)), CommitLayout(OP_2), ReleaseLayout(OP_2), AbortLayout(OP_2)):
        assert world.deployment.refusal(message, epoch=4) == "stale_epoch"
    assert world.status().transition is None


def test_commands_are_idempotent_and_one_transition_goes_on_at_a_time(world: World) -> None:
    request = world.request((0, 1, 2))
    world.call(request)
    world.call(request)
    assert world.deployment.refusal(msgspec.structs.replace(request, id=TransitionId("other"))) == "in_transition"
    assert world.deployment.refusal(CommitLayout(OP_2)) == "not_prepared"
    assert world.deployment.refusal(CommitLayout(TransitionId("other"))) == "not_found"
    world.wait("staged")
    world.call(request)
    assert world.deployment.refusal(CommitLayout(OP_2)) == "not_prepared"  # nobody sits in slot 2
    world.join(2)
    world.wait_prepared(0, 1, 2)
    for _ in range(2):
        world.call(CommitLayout(OP_2))
    assert world.deployment.refusal(AbortLayout(OP_2)) == "committed"
    world.flip()
    for _ in range(2):
        world.call(ReleaseLayout(OP_2))
    world.wait("released")
    for message in (request, CommitLayout(OP_2), ReleaseLayout(OP_2)):
        world.call(message)
    assert world.deployment.refusal(AbortLayout(OP_2)) == "committed"
    assert world.transition().phase == "released"
    world.wait_prepared(0, 1, 2)
    world.check_memory()


# ---- Giving up


@pytest.mark.parametrize("phase", ["vacating", "copying", "staged"])
def test_an_abort_leaves_nothing(world: World, phase: str) -> None:
    world.call(world.slow_request() if phase == "copying" else world.request((0, 1, 2)))
    if phase == "copying":
        world.wait("copying")
        wait_until(lambda: world.status().devices[2].pages > 0, "pages are made")
    elif phase == "staged":
        world.wait("staged")
        world.wait_prepared(0, 1)
    for _ in range(2):
        world.call(AbortLayout(OP_2))
    aborted = world.wait("aborted")
    assert aborted.error is None
    world.call(AbortLayout(OP_2))
    assert world.deployment.refusal(CommitLayout(OP_2)) == "aborted"
    world.wait_prepared(0, 1)
    world.check_undone()
    world.check_memory()
    assert world.ranks[0].seat.slots == (0, 1)
    world.call(world.request((0, 1, 2), id=TransitionId("again")))
    world.wait("staged")


def test_a_limited_transfer_takes_its_time_and_counts_what_it_makes(world: World) -> None:
    world.call(world.slow_request())
    copying = world.wait("copying")
    assert copying.bytes_total > 0
    wait_until(lambda: world.status().devices[2].pages >= 1 << 20, "pages are made")
    assert world.transition().phase == "copying"
    assert world.status().devices[2].kv == KV_HANDLES << 21  # counted from the start: a budget is a contract
    world.call(AbortLayout(OP_2))
    world.wait("aborted")


def test_what_could_not_be_staged_fails_and_is_given_up(world: World, tiny_mixtral: Path, tmp_path: Path) -> None:
    request = world.request((0, 1, 2))
    copies = tuple(msgspec.structs.replace(copy, source="") for copy in request.copies)
    weights = tiny_mixtral / "model.safetensors"
    weights.rename(tmp_path / "away")
    try:
        world.call(msgspec.structs.replace(request, copies=copies))
        failed = world.wait("failed")
        assert failed.error is not None
        assert failed.error.code == "bad_checkpoint"
        wait_until(lambda: world.status().devices[2].pages == 0, "what was made is given back")
        assert world.deployment.refusal(CommitLayout(OP_2)) == "not_prepared"
        world.call(AbortLayout(OP_2))
        world.wait("aborted")
        world.wait_prepared(0, 1)
        world.check_undone()
    finally:
        (tmp_path / "away").rename(weights)


def test_a_new_hmm_waits_for_no_rank_on_a_lost_device(world: World) -> None:
    world.call(world.request((0, 1, 2)))
    world.wait("staged")
    world.wait_prepared(0, 1)
    world.deployment.kill_hmm()
    world.ranks.pop(1).close()
    world.deployment.start_hmm()
    world.ranks[0].resume(world.deployment)
    world.deployment.members(0, 1, running=False)
    world.call(AbortLayout(OP_2))
    wait_until(lambda: world.transition().phase == "aborting", "it gives back")
    world.call(AbortLayout(OP_2, gone=(1,)))
    world.wait("aborted")
    world.wait_prepared(0)
    world.check_undone()


# ---- Joiners


def test_a_joiner_attaches_once_its_seat_is_staged_and_its_death_stops_nobody(world: World) -> None:
    with pytest.raises(ElasticMoEError, match="no seat"):
        Rank(world.deployment, 2)
    world.call(world.request((0, 1, 2)))
    with pytest.raises(ElasticMoEError, match="no seat"):
        Rank(world.deployment, 2)
    world.wait("staged")
    joiner = world.join(2)
    world.wait_prepared(0, 1, 2)
    assert world.deployment.refusal(AbortLayout(OP_2)) == "still_attached"
    world.ranks.pop(2)
    joiner.close()
    wait_until(lambda: world.transition().prepared == (0, 1), "the joiner is detached")
    assert world.ranks[0].bus.membership() == (1, 3, True, 1)
    assert world.deployment.refusal(CommitLayout(OP_2)) == "not_prepared"
    again = world.join(2)
    world.wait_prepared(0, 1, 2)
    world.ranks.pop(2)
    again.close()
    wait_until(lambda: world.transition().prepared == (0, 1), "the joiner is detached")
    world.call(AbortLayout(OP_2))
    world.wait("aborted")
    world.wait_prepared(0, 1)
    world.check_undone()


def test_a_joiner_that_dies_before_the_flip_parks_all_and_the_new_layout_comes_up_in_the_usual_way(
    world: World,
) -> None:
    world.call(world.request((0, 1, 2)))
    world.wait("staged")
    joiner = world.join(2)
    world.wait_prepared(0, 1, 2)
    world.call(CommitLayout(OP_2))
    generation = world.ranks[0].bus.staged()[0]
    joiner.close()
    wait_until(lambda: not world.ranks[0].bus.membership()[2], "all are parked")
    assert world.ranks[0].bus.staged() == (0, 0, 0)
    assert not world.ranks[0].bus.flip(generation)
    assert world.deployment.refusal(CommitLayout(TransitionId("other"))) == "not_found"
    world.join(2)
    world.deployment.members(0, 1, 2)
    assert world.ranks[0].bus.membership()[1:] == (7, True, 2)
    assert world.transition().phase == "flipped"
    world.call(ReleaseLayout(OP_2))
    world.wait("released")
    world.wait_prepared(0, 1, 2)
    world.check_memory()


def test_a_commit_while_all_are_parked_stages_nothing(world: World) -> None:
    world.call(world.request((0, 1, 2)))
    world.wait("staged")
    world.join(2)
    world.wait_prepared(0, 1, 2)
    world.deployment.members(0, 1, running=False)
    world.call(CommitLayout(OP_2))
    assert world.ranks[0].bus.staged() == (0, 0, 0)
    world.deployment.members(0, 1, 2)
    assert world.ranks[0].bus.membership()[1:] == (7, True, 2)
    assert world.transition().phase == "flipped"


# ---- Restarts


@pytest.mark.parametrize("phase", ["vacating", "copying"])
def test_an_hmm_killed_while_it_stages_gives_up(world: World, phase: str) -> None:
    world.call(world.slow_request())
    if phase == "copying":
        world.wait("copying")
        wait_until(lambda: world.status().devices[2].pages > 0, "pages are made")
    world.restart()
    failed = world.wait("failed")
    assert failed.error is not None
    assert failed.error.code == "interrupted"
    assert world.status().devices[2].pages == 0
    world.call(AbortLayout(OP_2))
    world.wait("aborted")
    world.wait_prepared(0, 1)
    world.check_undone()
    world.check_memory()


def test_an_hmm_that_is_stopped_while_it_copies_ends_at_once(world: World) -> None:
    world.call(world.slow_request())
    world.wait("copying")
    assert world.deployment.stop(world.deployment.hmm) == 0
    world.deployment.start_hmm()
    for rank in world.ranks.values():
        rank.resume(world.deployment)
    assert world.transition().phase == "failed"


@pytest.mark.parametrize("end", ["released", "aborted"])
def test_an_hmm_killed_while_it_makes_kv_makes_the_rest(world: World, end: str) -> None:
    world.call(world.request((0, 1, 2), bytes_per_s_max=1 << 20))
    world.wait("staged")
    if end == "released":
        world.join(2)
        world.wait_prepared(0, 1, 2)
        world.call(CommitLayout(OP_2))
        world.flip()
        world.call(ReleaseLayout(OP_2))
    else:
        world.call(AbortLayout(OP_2))

    def is_growing() -> bool:
        for rank in world.ranks.values():
            rank.follow()
        return world.status().devices[0].kv == KV_HANDLES << 21

    wait_until(is_growing, "KV grows")
    assert world.transition().phase == {"released": "releasing", "aborted": "aborting"}[end]
    assert len(world.ranks[0].kv) == KV_HANDLES - 1  # not before it is complete
    world.restart()
    world.wait(end)
    world.wait_prepared(*world.ranks)
    world.check_memory()
    assert len(world.ranks[0].kv) == KV_HANDLES


def test_an_abort_after_a_restart_waits_for_ranks_that_may_live(world: World) -> None:
    world.call(world.request((0, 1, 2)))
    world.wait("staged")
    joiner = world.join(2)
    world.wait_prepared(0, 1, 2)
    world.deployment.kill_hmm()
    world.deployment.start_hmm()
    world.call(AbortLayout(OP_2))
    assert world.deployment.status().devices[2].weights > 0  # the joiner may still have it mapped
    with pytest.raises(ElasticMoEError, match="no seat"):
        Rank(world.deployment, 2)
    world.ranks.pop(2)
    joiner.close()
    for rank in world.ranks.values():
        rank.resume(world.deployment)
    world.wait("aborted")
    world.wait_prepared(0, 1)
    world.check_undone()
    world.check_memory()


def test_an_hmm_killed_in_each_later_phase_goes_on(world: World) -> None:
    request = world.request((0, 1, 2))
    world.call(request)
    world.wait("staged")
    world.restart()
    assert world.transition().phase == "staged"
    world.call(request)
    world.join(2)
    world.wait_prepared(0, 1, 2)
    world.restart()
    assert world.deployment.status().layout != request.layout
    world.wait_prepared(0, 1, 2)
    world.call(CommitLayout(OP_2))
    world.restart()
    assert world.status().layout == request.layout
    assert world.transition().phase == "committed"
    assert world.ranks[0].bus.staged() == (2, 7, 2)
    world.flip()
    world.restart()
    assert world.transition().phase == "flipped"
    world.wait_prepared(0, 1, 2)
    world.call(ReleaseLayout(OP_2))
    assert world.transition().phase == "releasing"
    world.restart()
    world.wait("released")
    world.wait_prepared(0, 1, 2)
    world.restart()
    assert world.transition().phase == "released"
    world.wait_prepared(0, 1, 2)
    world.check_memory()


def test_a_seat_that_left_while_the_hmm_was_away_is_cleared(world: World) -> None:
    world.call(world.request((1,)))
    world.wait("staged")
    world.wait_prepared(1)
    world.call(CommitLayout(OP_2))
    world.flip(1)
    world.call(ReleaseLayout(OP_2))
    world.wait_prepared(1)
    world.deployment.kill_hmm()
    world.ranks.pop(0).close()  # nobody sees it
    world.deployment.start_hmm()
    world.ranks[1].resume(world.deployment)
    assert world.transition().phase == "releasing"  # it may still introduce itself
    world.wait("released")
    world.wait_prepared(1)
    world.check_memory()
    assert world.status().devices[0].pages == 0


def test_a_rank_of_a_seat_that_left_may_resume_but_nobody_may_take_it(world: World) -> None:
    world.call(world.request((1,)))
    world.wait("staged")
    world.wait_prepared(1)
    world.call(CommitLayout(OP_2))
    world.flip(1)
    world.call(ReleaseLayout(OP_2))
    world.restart()
    assert world.transition().phase == "releasing"
    assert world.status().devices[0].attached == world.ranks[0].request.incarnation
    world.ranks.pop(0).close()
    world.wait("released")
    with pytest.raises(ElasticMoEError, match="no seat"):
        Rank(world.deployment, 0)


# ---- Blocks


NUMBERS = itertools.count(1)


def copy_request(world: World, source: int, target: int, pairs: tuple[tuple[int, int], ...]) -> CopyBlocks:
    ranks = world.ranks
    by, to = ranks[source].request.incarnation, ranks[target].request.incarnation
    return CopyBlocks(source, by, target, to, next(NUMBERS), time.monotonic() + 30.0, pairs)


def test_blocks_are_copied_between_devices(world: World) -> None:
    first, second = world.ranks.values()
    last = len(first.kv) * first.reply.kv_geometry.blocks_per_handle - 1
    pairs = ((0, 5), (last, 0), (3, last))
    for number, (source, _) in enumerate(pairs):
        first.write_block(source, bytes([number + 1]) * first.reply.kv_geometry.block_bytes)
    world.call(copy_request(world, 0, 1, pairs))
    for source, target in pairs:
        assert second.block(target) == first.block(source)
    assert not any(second.block(1))
    world.call(copy_request(world, 1, 0, ()))


def test_blocks_of_others_than_the_attached_ranks_are_refused(world: World) -> None:
    good = copy_request(world, 0, 1, ((0, 0),))
    refusal = world.deployment.refusal
    for changes in ({"source_incarnation": "other"}, {"target_incarnation": "other"}, {"target_slot": 2}):
        assert refusal(msgspec.structs.replace(good, **changes)) == "stale_incarnation"
    same = good.source_incarnation
    assert refusal(msgspec.structs.replace(good, target_slot=0, target_incarnation=same)) == "invalid_request"
    limit = len(world.ranks[0].kv) * world.ranks[0].reply.kv_geometry.blocks_per_handle
    for pair in ((limit, 0), (0, limit)):
        assert refusal(msgspec.structs.replace(good, pairs=(pair,))) == "invalid_request"
    world.ranks[1].close()
    replacement = world.join(1)
    replacement.write_block(0, b"mine")
    assert refusal(good) == "stale_incarnation"
    assert replacement.block(0)[:4] == b"mine"


def test_blocks_go_to_a_joiner_and_kv_that_was_given_back_takes_none(world: World) -> None:
    world.call(world.request((0, 1, 2)))
    world.wait("staged")
    joiner = world.join(2)
    world.ranks[0].write_block(1, b"move")
    world.call(copy_request(world, 0, 2, ((1, 2),)))
    assert joiner.block(2)[:4] == b"move"
    blocks = world.ranks[0].reply.kv_geometry.blocks_per_handle
    gone = copy_request(world, 1, 0, ((0, (KV_HANDLES - 1) * blocks),))
    assert world.deployment.refusal(gone) == "invalid_request"


# ---- Facts


def test_the_planners_facts_are_settled_at_the_load(world: World, tiny_mixtral: Path) -> None:
    status = world.status()
    facts = status.memory
    assert facts is not None
    assert facts.footprint == max(device.weights + device.kv for device in status.devices)
    assert facts.ledger == status.devices[0].other
    assert (facts.granularity, facts.kv_handles_min) == (4096, 1)
    assert facts.kv == world.ranks[0].reply.kv_geometry
    assert load_message(tiny_mixtral).max_model_len == 64


@pytest.mark.parametrize("revision", [0, 1 << 62])
def test_a_rank_that_says_what_it_cannot_know_is_detached(world: World, revision: int) -> None:
    world.ranks[0].channel.send(Applied(revision))
    if revision:
        wait_until(lambda: world.deployment.status().devices[0].attached is None, "the rank is detached")
    else:  # of an earlier message: nothing new
        assert world.deployment.status().devices[0].attached is not None
