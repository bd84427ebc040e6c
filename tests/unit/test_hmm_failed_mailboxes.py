"""Mailboxes of a device that has failed: ranks that come anew are not told of what would end them, so that the layout
that leaves the device out can begin; those that have them already, or whose peer there lives, are. On the stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.common.devices import factory
from elasticmoe.common.devices.base import ProcessRules
from elasticmoe.common.protocol.handles import SeatMemory
from elasticmoe.native.bus import Bus
from elasticmoe.services.hmm.sessions.handles import Importer, Offer, full_view, seat_memory
from elasticmoe.services.worker.hmm import memory as memory_module
from elasticmoe.services.worker.hmm.mailboxes import Mailboxes
from tests.devices import standins
from tests.unit.test_hmm_failed_device import DEVICE_BYTES, without
from tests.unit.test_hmm_memory_shortage import World

pytestmark = pytest.mark.slow


class Rank:
    """A process that maps the mailboxes that it is told of. `attached`: slots of the ranks that live."""

    def __init__(self, kind: str, folder: Path, slot: int, bus: Bus, attached: dict[int, Any]) -> None:
        process = standins.process(kind, folder)
        self.slot, self.name = slot, f"host:{slot}"
        self.device = process(self.name, standins.GRANULARITY, rules=ProcessRules())
        self.importer = Importer(process.importer_number(slot), attached)
        self.mailboxes = Mailboxes(self.device, bus)

    def follow(self, seat: SeatMemory, offer: Offer) -> None:
        """As RankMemory does."""
        fds = list(offer.fds)
        self.mailboxes.follow({one.slot: memory_module._token(one.handle, fds) for one in seat.mailboxes})


class MailboxWorld(World):
    """A World whose ranks have mailboxes, each mapped in a process of its own."""

    def __init__(self, kind: str, folder: Path, model: Path, run_dir: Path) -> None:
        self.kind, self.folder, self.ranks = kind, folder, list[Rank]()
        super().__init__(model, run_dir, device_bytes=DEVICE_BYTES, exchange="mailbox")

    def attach(self, slot: int) -> None:
        """As the HMM lets in a rank that comes anew."""
        super().attach(slot)
        segment, loaded = self.holdings.segment, self.holdings.loaded
        assert segment is not None
        assert segment.bus is not None
        assert loaded is not None
        attached = self.by_slot[slot]
        del self.by_slot[slot]
        rank, memory = (
            Rank(self.kind, self.folder, slot, segment.bus, self.by_slot),
            self.holdings.memories[f"host:{slot}"],
        )
        self.ranks.append(rank)
        rank.importer.admit(memory.device)
        view = full_view(memory, loaded, self.holdings.transition)
        rank.follow(*seat_memory(view, memory, self.holdings, rank.importer))
        attached.importer, attached.rank = rank.importer, rank
        self.by_slot[slot] = attached

    def _share(self, attached: Any, tell: Callable[[Importer], tuple[SeatMemory, Offer]]) -> None:
        attached.rank.follow(*tell(attached.importer))
        super()._share(attached, tell)

    def kill(self, slot: int) -> None:
        """The rank there."""
        self.by_slot.pop(slot).rank.device.close()
        self.transitions.on_detach(slot)
        self.members.park(slot)

    def seen(self, slot: int) -> list[int]:
        """Slots whose mailboxes the rank there has mapped."""
        return sorted(self.by_slot[slot].rank.mailboxes)

    def close(self) -> None:
        for rank in self.ranks:
            rank.device.close()
        super().close()


@pytest.fixture
def world(
    kind: str, folder: Path, tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MailboxWorld]:
    monkeypatch.setitem(factory._BACKENDS, "host", standins.process(kind, folder))
    made = MailboxWorld(kind, folder, tiny_mixtral, tmp_path)
    yield made
    made.close()


def lose(world: MailboxWorld) -> None:
    """The device of slot 1, as the HMM finds when it asks."""
    standins.lose(world.folder, 1)
    device = world.holdings.memories["host:1"].device
    device.fence()
    assert device.failure


def test_a_rank_that_is_replaced_takes_part_in_the_layout_that_leaves_a_lost_device_out(world: MailboxWorld) -> None:
    assert [world.seen(slot) for slot in (0, 1)] == [[0, 1], [0, 1]]
    lose(world)
    world.kill(1)
    world.kill(0)
    world.attach(0)
    request = without("host:1", world.request(0), world.layout)
    world.transitions.stage(request)
    world.turn_to("staged")
    assert world.seen(0) == [0]
    world.transitions.commit(request.id)
    world.members.publish((0,), True)
    world.turn_to("flipped")
    world.transitions.release(request.id)
    world.turn_to("released")
    assert (world.holdings.check_integrity(), world.layout.slots) == ([], (0,))
    assert world.holdings.memories["host:1"].mailbox is None


def test_a_rank_that_has_a_lost_devices_mailbox_keeps_it(world: MailboxWorld) -> None:
    """Its peer may be in a generation that runs: perhaps only the HMM's process has lost the device."""
    world.kill(0)
    world.attach(0)
    assert world.seen(0) == [0, 1]
    lose(world)
    world.kill(1)
    request = without("host:1", world.request(0), world.layout)
    world.transitions.stage(request)
    world.turn_to("staged")
    assert world.seen(0) == [0, 1]
    world.transitions.abort(request.id)
    world.turn_to("aborted")


def test_a_rank_that_comes_anew_has_the_mailbox_of_a_peer_that_lives(world: MailboxWorld, kind: str) -> None:
    """Where the driver lets it: an NPU's asks this process, which has lost the device."""
    lose(world)
    world.kill(0)
    world.attach(0)
    assert world.seen(0) == ([0, 1] if kind == "cuda" else [0])
    world.kill(1)
    world.kill(0)
    world.attach(0)
    assert world.seen(0) == [0]
