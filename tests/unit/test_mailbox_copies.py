"""Copies between the mailboxes of NPUs: the driver's, in the order of what computes, and of the same bits as others."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from elasticmoe.common.devices import ascend, torch_devices
from elasticmoe.common.devices.base import Device
from elasticmoe.common.protocol.errors import DeviceError
from elasticmoe.services.worker.backends.torch import TorchBackend
from elasticmoe.services.worker.exchange.mailbox import MailboxExchange
from elasticmoe.services.worker.hmm.mailboxes import Mailboxes
from tests.devices import standins
from tests.devices.backends import ALL_KINDS, Machine, machine
from tests.unit.backends import QueuedBackend
from tests.unit.exchanges import Host
from tests.unit.test_exchanges import EXPERTS, HIDDEN, SHAPE, TOKENS, Rank, Work, check, step
from tests.unit.test_mailboxes import GRANULARITY, Owner


@pytest.fixture
def npus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with machine("npu", tmp_path, monkeypatch) as made:
        yield made


class Ranks:
    """Ranks on the first devices, whose exchange copies as their devices do."""

    def __init__(self, place: Machine, num: int, backend: type[TorchBackend] = TorchBackend) -> None:
        self.host, self.owner = Host(SHAPE), Owner(place)
        slots = range(num)
        self.users: list[Device] = [place.process().open(slot, GRANULARITY) for slot in slots]
        self.all = []
        self.mapped = []
        for slot, user in enumerate(self.users):
            rank = Rank(self.host, "mailbox", slot, backend)
            mapped = Mailboxes(user, rank.bus)
            mapped.follow(self.owner.tokens(user, *slots))
            rank.exchange = MailboxExchange(rank.bus, EXPERTS, rank.backend, mapped, queue_copy=user.queue_copy)
            self.all.append(rank)
            self.mapped.append(mapped)

    def library(self, slot: int) -> Any:
        """A rank's driver, which counts."""
        return standins.loaded(type(self.users[slot]))  # type: ignore[arg-type]

    def close(self) -> None:
        for user in self.users:
            user.close()
        self.owner.close()


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((kind, TorchBackend) for kind in ALL_KINDS),
        *((kind, QueuedBackend) for kind in ALL_KINDS if kind != "npu"),  # its driver knows no queue of that one
    ],
)
def test_sums_have_the_bits_of_the_direct_ones_whatever_copies(
    kind: str, backend: type[TorchBackend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(kind, tmp_path, monkeypatch) as place:
        ranks = Ranks(place, 2, backend)
        for generation in range(1, 4):
            ranks.host.observer.set_membership(generation, 0b11, True)
            works = [Work(10 * generation + slot, (TOKENS, 0, 3)[(slot + generation) % 3]) for slot in (0, 1)]
            for rank in ranks.all:
                rank.route(generation, [0, 1], turn=generation)
            check(works, step(ranks.all, works))
        ranks.close()


def test_each_way_between_two_npus_is_one_copy_of_the_drivers(npus: Machine) -> None:
    """Both have rows for both in each of the two layers that have experts: two copies in, two out. Tokens are fetched
    whole; an answer goes for each choice."""
    ranks = Ranks(npus, 2)
    ranks.host.observer.set_membership(1, 0b11, True)
    works = [Work(slot + 1, TOKENS) for slot in (0, 1)]
    for rank in ranks.all:
        rank.route(1, [0, 1])
    check(works, step(ranks.all, works))
    layers = [layer for layer, count in enumerate(EXPERTS) if count]
    for slot in (0, 1):
        library = ranks.library(slot)
        assert library.standin_num_copied() == len(layers) * 2 * 2
        fetched = len(layers) * 2 * TOKENS
        answered = sum(((ids >= 0) & (ids % 2 == slot)).sum() for work in works for ids in work.ids.values())
        assert library.standin_bytes_copied() == (fetched + answered) * HIDDEN * 4
    ranks.close()


def torchs_stream(user: Device, monkeypatch: pytest.MonkeyPatch) -> tuple[ctypes.c_void_p, list[torch.device]]:
    """A stream that stands for torch's own on that device, and the devices whose stream was asked for."""
    driver: Any = user._driver  # type: ignore[attr-defined]
    stream, asked = ctypes.c_void_p(), list[torch.device]()
    driver.library.call("aclrtCreateStream", ctypes.byref(stream))

    def queue_of(device: torch.device) -> int | None:
        asked.append(device)
        return stream.value

    monkeypatch.setattr(ascend, "queue_of", queue_of)
    return stream, asked


def test_a_copy_is_done_in_the_order_of_torchs_queue_and_not_waited_for(
    npus: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(npus, 2)
    user, own, peers = ranks.users[0], ranks.mapped[0][0].x_NH, ranks.mapped[0][1].x_NH
    stream, asked = torchs_stream(user, monkeypatch)
    peers.fill_(7.0)
    own.fill_(0.0)
    before = ranks.library(0).standin_calls()
    user.queue_copy(own, peers)
    user.queue_copy(peers[:2], own[:2])
    assert ranks.library(0).standin_calls() - before == 2
    assert asked == [own.device] * 2
    assert torch.all(own == 0.0), "it is queued"
    user._driver.library.call("aclrtSynchronizeStream", stream)  # type: ignore[attr-defined]
    assert torch.all(own == 7.0)
    ranks.close()


def test_rows_that_no_copy_may_be_queued_for_are_copied_behind_what_is_queued(
    npus: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a hidden size that is no multiple of 16, but for the first."""
    ranks = Ranks(npus, 2)
    user, own, peers = ranks.users[0], ranks.mapped[0][0].x_NH, ranks.mapped[0][1].x_NH
    torchs_stream(user, monkeypatch)
    assert own.stride(0) * own.itemsize % 64
    peers.fill_(7.0)
    own.fill_(0.0)
    user.queue_copy(own, peers)
    assert torch.all(own == 0.0), "it is queued"
    peers.fill_(5.0)
    user.queue_copy(peers[3:4], own[1:2])
    assert torch.all(own == 5.0), "what was queued has read what was there by then"
    assert torch.all(peers == 5.0)
    own.fill_(3.0)
    user.queue_copy(peers[1:3], own[2:4])
    assert peers[:, 0].tolist() == [5.0, 3.0, 3.0, *[5.0] * (len(peers) - 3)]
    ranks.close()


def test_what_the_driver_cannot_copy_as_one_piece_is_refused(npus: Machine) -> None:
    ranks = Ranks(npus, 1)
    user, own = ranks.users[0], ranks.mapped[0][0].x_NH
    for target, source in (
        (own[:2], own[2:5]),
        (own[:2], own[2:4].double()),
        (own[:2, :4], own[2:4, :4]),
    ):
        with pytest.raises(DeviceError, match="of one form, without gaps"):
            user.queue_copy(target, source)
    before = ranks.library(0).standin_calls()
    user.queue_copy(own[:0], own[:0])
    assert ranks.library(0).standin_calls() == before
    ranks.close()


def test_the_queue_is_torchs_current_stream_asked_for_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking is what has torch_npu hand over what it holds back."""
    streams = iter((11, 12))

    class Stream:
        @property
        def npu_stream(self) -> int:
            return next(streams)

    class Npu:
        @staticmethod
        def current_stream(device: torch.device) -> Stream:
            assert device == "npu:1"
            return Stream()

    class Named(str):
        type = "npu"

    monkeypatch.setattr(torch, "npu", Npu, raising=False)
    device: Any = Named("npu:1")
    assert [torch_devices.queue_of(device) for _ in range(2)] == [11, 12]
    assert torch_devices.queue_of(torch.device("cpu")) is None
