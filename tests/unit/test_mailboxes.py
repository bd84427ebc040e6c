"""Mailboxes on each kind of device: one process owns them, ranks on other devices map them and exchange tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from elasticmoe.common.devices.base import Device, FdToken, Handle
from elasticmoe.common.devices.rules import Token
from elasticmoe.common.model_spec import round_up
from elasticmoe.common.protocol.errors import DeviceError
from elasticmoe.services.worker.hmm.mailboxes import Mailboxes
from tests.devices import standins
from tests.devices.backends import ALL_KINDS, Machine, machine
from tests.unit.exchanges import Host
from tests.unit.test_exchanges import SHAPE, TOKENS, Rank, Work, check, step

RANKS, _, HIDDEN, TOP_K = SHAPE
GRANULARITY = standins.GRANULARITY
NBYTES = round_up(TOKENS * (1 + TOP_K) * HIDDEN * 4, GRANULARITY)


@pytest.fixture(params=ALL_KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "devices").mkdir()
    with machine(request.param, tmp_path / "devices", monkeypatch) as made:
        yield made


class Owner:
    """The HMM's part: a mailbox on each device, shared with the ranks."""

    def __init__(self, place: Machine) -> None:
        process = place.process()
        self.devices = [process.open(index, GRANULARITY, 16 * GRANULARITY) for index in range(RANKS)]
        self.handles = [device.create(NBYTES, "mailbox") for device in self.devices]

    def tokens(self, user: Device, *slots: int) -> dict[int, Token]:
        """What a rank is sent for these slots, once it is admitted."""
        named = {slot: self.devices[slot].export(self.handles[slot]) for slot in slots}
        for slot in slots:
            self.devices[slot].admit_to(self.handles[slot], [user.importer_number(0)])
        return named

    def replace(self, slot: int) -> Handle:
        """The seat has left, and another one has come to its slot."""
        self.devices[slot].release(self.handles[slot])
        self.handles[slot] = self.devices[slot].create(NBYTES, "mailbox")
        return self.handles[slot]

    def close(self) -> None:
        for device in self.devices:
            device.close()


def test_ranks_on_different_devices_exchange_by_them(place: Machine) -> None:
    host, owner = Host(SHAPE), Owner(place)
    users = [place.process().open(slot, GRANULARITY) for slot in (0, 1)]
    ranks = []
    for slot, user in enumerate(users):
        ranks.append(Rank(host, "mailbox", slot))
        mapped = Mailboxes(user, ranks[-1].bus)
        mapped.follow(owner.tokens(user, 0, 1))
        ranks[-1].exchange = type(ranks[-1].exchange)(ranks[-1].bus, (10, 0, 4), ranks[-1].backend, mapped)  # type: ignore[call-arg]
    host.observer.set_membership(1, 0b11, True)
    works = [Work(slot, TOKENS - slot) for slot in (0, 1)]
    for rank in ranks:
        rank.route(1, [0, 1])
    check(works, step(ranks, works))
    for user in users:
        user.close()
    owner.close()


def test_they_come_and_go_and_what_stays_keeps_its_place(place: Machine) -> None:
    host, owner = Host(SHAPE), Owner(place)
    user = place.process().open(0, GRANULARITY)
    mapped = Mailboxes(user, host.join(0))
    mapped.follow(owner.tokens(user, 0, 1))
    own, other = mapped[0].x_NH, mapped[1].x_NH
    own.fill_(7.0)
    address = own.data_ptr(), other.data_ptr()
    mapped.follow(owner.tokens(user, 0, 1, 2))
    assert (mapped[0].x_NH.data_ptr(), mapped[1].x_NH.data_ptr()) == address
    assert torch.all(mapped[0].x_NH == 7.0)
    assert sorted(mapped) == [0, 1, 2]
    mapped.follow(owner.tokens(user, 0))
    assert list(mapped) == [0]
    mapped[0].returned_PH.fill_(1.0)
    owner.replace(1)
    mapped.follow(owner.tokens(user, 0, 1))
    assert torch.all(mapped[1].x_NH == 0.0), "another seat's, which begins with zeros"
    assert torch.all(mapped[0].returned_PH == 1.0)
    user.close()
    owner.close()


def test_another_mailbox_in_a_slot_takes_the_place_of_the_one_that_left(place: Machine) -> None:
    host, owner = Host(SHAPE), Owner(place)
    user = place.process().open(0, GRANULARITY)
    mapped = Mailboxes(user, host.join(0))
    mapped.follow(owner.tokens(user, 0, 1))
    mapped[1].x_NH.fill_(7.0)
    owner.handles[1] = owner.devices[1].create(NBYTES, "mailbox")
    mapped.follow(owner.tokens(user, 0, 1))
    assert torch.all(mapped[1].x_NH == 0.0)
    user.close()
    owner.close()


def test_what_names_no_memory_is_refused_and_what_was_mapped_stays(place: Machine) -> None:
    host, owner = Host(SHAPE), Owner(place)
    user = place.process().open(0, GRANULARITY)
    mapped = Mailboxes(user, host.join(0))
    named = owner.tokens(user, 0, 1)
    mapped.follow({0: named[0]})
    token = named[1]
    bad = token._replace(fd=-1) if isinstance(token, FdToken) else token._replace(key=12345)
    with pytest.raises(DeviceError):
        mapped.follow({0: named[0], 1: bad})
    assert list(mapped) == [0]
    mapped.follow(named)
    assert sorted(mapped) == [0, 1]
    user.close()
    owner.close()
