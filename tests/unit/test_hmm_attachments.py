"""The handle channel's HMM side: large messages to ranks that are busy, and what ranks may say."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import msgspec
import pytest

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.devices.base import FdToken, Handle, KeyToken, ProcessRules
from elasticmoe.common.devices.factory import open_device
from elasticmoe.common.devices.host import HostDevice
from elasticmoe.common.fdchannel import Channel, Listener, close_all, connect
from elasticmoe.common.layout import RankId
from elasticmoe.common.model_spec import KvGeometry, RecordKey
from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit, ElasticMoEError, Unavailable
from elasticmoe.common.protocol.handles import (
    TO_RANK,
    Applied,
    Attach,
    AttachReply,
    FromHmm,
    FromRank,
    RecordHandle,
    SeatMemory,
    Segment,
    SharedFd,
    ShareHandles,
)
from elasticmoe.common.protocol.limits import FDS_MAX
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.hmm.sessions import attachments as attachments_module
from elasticmoe.services.hmm.sessions.attachments import Attachments
from elasticmoe.services.hmm.sessions.handles import HANDLES_MAX, Importer, Importers, Offer
from tests.procs.descriptors import left_with, numbers_of
from tests.procs.waiting import wait_until
from tests.unit.specs import tiny_mixtral_spec

PAGE = 4096
SEGMENT = Segment(0, 4096)
REPLY = AttachReply("m", tiny_mixtral_spec(), "f", 4096, KvGeometry(16, 4096, 4096, 1, 4096), 4096, SEGMENT, SEGMENT)
UNUSED: Any = None
SEAT = SeatMemory(1, (), (), (), (0,), (0,))
LARGE = SeatMemory(0, tuple(RecordHandle(RecordKey("expert", 0, i), i << 40) for i in range(100_000)), (), (), (), ())


class Pair:
    """Attachments with one rank, whose end is `channel`."""

    def __init__(self, path: Path) -> None:
        self.subject = Attachments(Listener(path), "hmm:1", get_logger("test"), SYSTEM_CLOCK)
        self.channel: Channel[FromHmm] = connect(path, "rank:1", TO_RANK)
        self.channel.send(Attach(RankId(0, 0), 0, "host:0", "r0"))
        self.subject.accept(self.subject.fds())
        ((accepted, request),) = wait_until(lambda: self.subject.requests(self.subject.fds()), "the rank asks")
        self.fd = os.memfd_create("x")
        os.write(self.fd, b"content")
        self.rank = self.subject.admit(accepted, request, REPLY, (self.fd,))
        self.subject.update(self.rank, SEAT, self.offer)

    @property
    def offer(self) -> Offer:
        """A descriptor, and no handles."""
        return Offer((self.fd,), UNUSED, {})

    def take(self) -> list[int]:
        """One turn of the loop: slots of ranks that ended."""
        return [one.slot for one in self.subject.take(self.subject.fds())]

    def read_first(self) -> None:
        """What every rank is told when it attaches."""
        for kind in (AttachReply, SeatMemory):
            received, fds = self.channel.receive()
            assert isinstance(received.body, kind)
            for fd in fds:
                os.close(fd)

    def close(self) -> None:
        self.channel.close()
        self.subject.close()
        os.close(self.fd)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(attachments_module, "_SEND_BUFFER_BYTES", 1 << 16)
    made = Pair(tmp_path / "s.sock")
    yield made
    made.close()


def test_a_large_message_waits_for_a_busy_rank_and_holds_up_nobody(pair: Pair) -> None:
    first = pair.rank.sent.revision
    pair.subject.update(pair.rank, LARGE, pair.offer)  # returns, though nobody reads
    pair.subject.update(pair.rank, SEAT, pair.offer)
    assert not pair.rank.outbox.is_empty
    assert pair.subject.turn_ms(500) < 500
    pair.read_first()
    found: list[SeatMemory] = []
    with socket.socket(fileno=os.dup(pair.channel.fileno())) as raw:
        head = raw.recv(4, socket.MSG_PEEK)  # nothing is read: the rest is sent as the rank reads
        assert len(head) == 4

    def read() -> bool:
        assert pair.take() == []
        return pair.rank.outbox.is_empty

    def drain() -> None:
        for _ in range(2):
            received, fds = pair.channel.receive(deadline_ms=10_000)
            assert isinstance(received.body, SeatMemory)
            assert [os.pread(fd, 7, 0) for fd in fds] == [b"content"]
            for fd in fds:
                os.close(fd)
            found.append(received.body)

    thread = threading.Thread(target=drain)
    thread.start()
    wait_until(read, "all is sent")
    thread.join(60)
    assert [len(seat.records) for seat in found] == [100_000, 0]
    assert first < found[0].revision < found[1].revision
    pair.channel.send(Applied(found[1].revision))
    wait_until(lambda: pair.take() == [] and pair.rank.applied == found[1].revision, "the rank has applied it")
    assert pair.subject.turn_ms(500) == 500


def test_what_was_sent_last_is_not_sent_again(pair: Pair) -> None:
    before = pair.rank.sent.revision
    pair.subject.update(pair.rank, SEAT, pair.offer)
    assert pair.rank.sent.revision == before > 0


def test_the_end_of_a_rank_is_seen_also_while_something_is_unsent(pair: Pair) -> None:
    pair.subject.update(pair.rank, LARGE, pair.offer)
    pair.channel.close()
    assert wait_until(pair.take, "the end is seen") == [0]
    assert pair.subject.by_slot == {}


def test_memory_that_a_driver_does_not_share_ends_the_rank_and_nobody_else(pair: Pair) -> None:
    def refuse(importer: Importer) -> tuple[SeatMemory, Offer]:
        raise DeviceError(f"the process {importer.number} is gone")

    pair.subject.share(pair.rank, refuse)
    pair.read_first()
    with pytest.raises(Unavailable):
        pair.channel.receive()
    assert wait_until(pair.take, "the end is seen") == [0]


def test_handles_that_a_driver_does_not_share_end_the_rank_and_nobody_else(pair: Pair) -> None:
    """As where it is to admit a process that has just ended."""

    def refuse(_: Handle) -> FdToken:
        raise DeviceError("the process is gone", code="driver_refused")

    device: Any = SimpleNamespace(export=refuse)
    handle: Any = object()
    pair.subject.update(pair.rank, msgspec.structs.replace(SEAT, kv=(7,)), Offer((pair.fd,), device, {7: handle}))
    pair.read_first()
    with pytest.raises(Unavailable):
        pair.channel.receive()
    assert wait_until(pair.take, "the end is seen") == [0]


def test_memory_that_is_not_shared_for_want_of_descriptors_ends_the_rank_and_nobody_else(pair: Pair) -> None:
    def refuse(_: Importer) -> tuple[SeatMemory, Offer]:
        raise Unavailable("no descriptor is left", code="no_descriptors")

    pair.subject.share(pair.rank, refuse)
    assert wait_until(pair.take, "the end is seen") == [0]


def test_a_rank_that_is_refused_after_all_leaves_its_slot_free(pair: Pair) -> None:
    """Whoever comes to the slot next asks whether it has ended."""
    pair.subject.refuse(pair.rank.channel, DeviceError("the device has failed", code="driver_failed"))
    assert pair.subject.by_slot == {}
    assert pair.subject.ended_now(0) is None
    pair.subject.check_vacant(0)
    assert pair.take() == []


def test_a_process_is_admitted_once_to_a_handle() -> None:
    asked: list[tuple[int, tuple[int, ...]]] = []
    device: Any = SimpleNamespace(admit_to=lambda handle, importers: asked.append((handle.place, importers)))
    one, other = (Handle("npu:0", PAGE, "local", "mailbox", True, None, place=place) for place in range(2))
    first = Importer(77)
    for handle in (one, other, one):
        first.admit_to(device, handle)
    assert asked == [(0, (77,)), (1, (77,))]
    one.is_live = False
    again = Handle("npu:0", PAGE, "local", "mailbox", True, None, place=0)  # another one in its place
    first.admit_to(device, again)
    Importer(77).admit_to(device, other)  # another rank's process, of the number of one that has ended
    assert asked[2:] == [(0, (77,)), (1, (77,))]


def test_a_rank_that_resumes_is_the_process_that_was_admitted() -> None:
    """A driver that has lost the device since is asked for nothing, and the rank goes on there."""
    asked: list[Sequence[int]] = []
    device: Any = SimpleNamespace(admit=asked.append, check_usable=lambda: None)
    request = Attach(RankId(0, 0), 0, "npu:0", "r0", importer=77)
    importers = Importers(())
    first = importers.of(request)
    first.admit(device)
    again = importers.of(msgspec.structs.replace(request, resume=True))
    again.admit(device)
    assert (again is first, asked) == (True, [[77]])
    importers.of(msgspec.structs.replace(request, slot=1, incarnation="r1")).admit(device)
    importers.of(msgspec.structs.replace(request, incarnation="r2")).admit(device)  # with the number of one that ended
    assert asked == [[77]] * 3
    handle = Handle("npu:1", PAGE, "local", "mailbox", True, None)
    assert not importers.of(request).may_have(handle), "it is another one than the latest there"
    resumed = msgspec.structs.replace(request, incarnation="r3", resume=True)
    assert importers.of(resumed).may_have(handle), "a predecessor of this HMM may have admitted it"


def test_a_device_that_only_this_process_has_lost_takes_ranks_that_resume_and_no_others() -> None:
    def fail() -> None:
        raise DeviceError("host:0 cannot be used", code="driver_failed")

    device: Any = SimpleNamespace(admit=lambda _: None, check_usable=fail)  # as a GPU's, which asks nobody
    request = Attach(RankId(0, 0), 0, "host:0", "r0")
    with pytest.raises(DeviceError, match="cannot be used"):
        Importers(()).of(request).admit(device)
    Importers(()).of(msgspec.structs.replace(request, resume=True)).admit(device)


@pytest.mark.parametrize("message", [Applied(1 << 62), Attach(RankId(0, 0), 0, "host:0", "r0")])
def test_what_no_rank_may_say_ends_the_connection(pair: Pair, message: Applied) -> None:
    pair.channel.send(message)
    assert wait_until(pair.take, "the breach is seen") == [0]


@pytest.mark.parametrize("left", [0, 1])
def test_without_descriptors_a_rank_is_let_go_and_comes_again(pair: Pair, left: int) -> None:
    """What was not sent must not count as sent: the rank would never map it."""
    before = numbers_of(os.getpid())
    with left_with(os.getpid(), left):
        pair.subject.update(pair.rank, msgspec.structs.replace(SEAT, kv=(7,)), Offer((pair.fd, pair.fd), UNUSED, {}))
    assert numbers_of(os.getpid()) == before
    pair.read_first()
    with pytest.raises(Unavailable):
        pair.channel.receive()
    assert wait_until(pair.take, "the end is seen") == [0]


def test_without_descriptors_nobody_is_admitted(pair: Pair) -> None:
    request = Attach(RankId(1, 0), 1, "host:1", "r1")
    before = numbers_of(os.getpid())
    for left in (0, 1):
        with left_with(os.getpid(), left), pytest.raises(Unavailable) as caught:
            pair.subject.admit(pair.rank.channel, request, REPLY, (pair.fd,))
        assert caught.value.code == "no_descriptors"
    assert numbers_of(os.getpid()) == before
    assert list(pair.subject.by_slot) == [0]


class OneEach(HostDevice):
    """Shares every handle by a descriptor of its own, as devices do whose handles are no parts of a file. Of the
    descriptors there are a few more than one message takes, in turn."""

    def __init__(self) -> None:
        super().__init__("host:0", PAGE, HANDLES * PAGE, rules=ProcessRules())
        self.prepare()
        (file,) = {fd for name, fd in self.descriptors().items() if name == "kv"}
        self._pool = itertools.cycle([os.dup(file) for _ in range(FDS_MAX + 10)])

    def _export(self, handle: Handle) -> FdToken:
        return FdToken(next(self._pool), handle.place, handle.nbytes)

    def _close(self) -> None:
        for fd in {next(self._pool) for _ in range(FDS_MAX + 10)}:
            os.close(fd)
        super()._close()


HANDLES = 20_000


def test_tens_of_thousands_of_handles_with_a_descriptor_each_are_handed_over(pair: Pair) -> None:
    """Neither side has more of them open than a message takes: both would run into the limit of open files."""
    owner, user = OneEach(), open_device("host:0", PAGE, rules=ProcessRules())
    handles = [owner.create(PAGE, "kv") for _ in range(HANDLES)]
    offer = Offer((), owner, {owner.id_of(handle): handle for handle in handles})
    seat = SeatMemory(0, (), tuple(owner.id_of(handle) for handle in handles), (), (), ())
    imported: dict[int, Handle] = {}
    found: list[SeatMemory] = []
    most = 0

    def read() -> None:
        nonlocal most
        pair.read_first()
        while not found:
            received, fds = pair.channel.receive(deadline_ms=10_000)
            most = max(most, len(fds))
            if isinstance(received.body, SeatMemory):
                found.append(received.body)
            elif isinstance(received.body, ShareHandles):
                for one in received.body.handles:
                    assert isinstance(one.token, SharedFd)
                    imported[one.id] = user.import_(FdToken(fds[one.token.fd], one.token.offset, one.nbytes))
            for fd in fds:
                os.close(fd)

    thread = threading.Thread(target=read)
    with left_with(os.getpid(), FDS_MAX + 10):
        thread.start()
        pair.subject.update(pair.rank, seat, offer)
        wait_until(lambda: pair.take() == [] and pair.rank.outbox.is_empty, "all is sent")
        thread.join(20.0)
    assert [len(one.kv) for one in found] == [HANDLES]
    assert set(found[0].kv) == set(imported)
    assert most == FDS_MAX
    range_ = user.reserve(HANDLES * PAGE)
    user.map_many(range_, [(at * PAGE, imported[owner.id_of(handle)]) for at, handle in enumerate(handles)], True)
    there = owner.reserve(PAGE)
    owner.map(there, 0, handles[12_345], True)
    owner.write_bytes(there.base, b"number")
    assert user.read_bytes(range_.address(12_345 * PAGE), 6) == b"number"
    pair.subject.update(
        pair.rank, msgspec.structs.replace(seat, slots=(0,), doorbells=(0,)), offer._replace(fds=(pair.fd,))
    )
    assert isinstance(pair.channel.receive()[0].body, SeatMemory)  # nothing is handed over twice
    user.close()
    owner.close()


REFUSED: Final = DeviceError("the process is gone", code="driver_refused")


class Keys:
    """A device that shares by numbers. `asked`: the handles that it was asked to share; from number `failing` on it
    refuses to."""

    def __init__(self, failing: int = 1 << 62, error: ElasticMoEError = REFUSED) -> None:
        self.asked: list[int] = []
        self._failing, self._error = failing, error

    def export(self, handle: int) -> KeyToken:
        if handle >= self._failing:
            raise self._error
        self.asked.append(handle)
        return KeyToken(handle, PAGE)

    def offer(self, first: int, num_messages: int) -> tuple[SeatMemory, Offer]:
        """So many messages of handles, which are numbers here, and the goal that names them."""
        names = range(first, first + num_messages * HANDLES_MAX)
        device, handles = cast(Any, self), cast(Any, {name: name for name in names})
        return msgspec.structs.replace(SEAT, kv=tuple(names), doorbells=()), Offer((), device, handles)


def turn(pair: Pair) -> list[tuple[Channel[FromRank], Attach]]:
    """As the HMM's; who asks to be attached."""
    ready = pair.subject.fds()
    assert pair.subject.take(ready) == []
    asking = pair.subject.requests(ready)
    pair.subject.accept(ready)
    return asking


def test_who_asks_meanwhile_is_answered_between_two_messages_of_thousands_of_handles(
    pair: Pair, tmp_path: Path
) -> None:
    device, num = Keys(), 20
    pair.subject.update(pair.rank, *device.offer(0, num))
    assert len(device.asked) == HANDLES_MAX, "the first message is made at once"
    assert pair.subject.turn_ms(500) == 0, "for the others the loop comes back, and sleeps no more"
    pair.read_first()
    with closing(connect(tmp_path / "s.sock", "rank:2", TO_RANK)) as other:
        other.send(Attach(RankId(1, 0), 1, "host:1", "r1"))
        ((channel, request),) = wait_until(lambda: turn(pair), "another rank asks")
        second = pair.subject.admit(channel, request, REPLY, (pair.fd,))
        received, fds = other.receive()
        close_all(fds)
        assert isinstance(received.body, AttachReply)
        assert len(device.asked) < num * HANDLES_MAX, "it was answered before all was handed over"
        before = len(device.asked)
        pair.subject.update(second, *device.offer(HANDLES, 3))
        for _ in range(4):
            turn(pair)
        made = [name >= HANDLES for name in device.asked[before::HANDLES_MAX]]
        assert made == [True, True, False, True, False], "ranks take turns"
        channels, found = {0: pair.channel, 1: other}, dict[int, list[int]]({0: [], 1: []})
        for slot, end in channels.items():
            while True:
                received, _ = wait_until(lambda end=end: turn(pair) or (end.is_readable and end.receive()), "more")
                if isinstance(received.body, SeatMemory):
                    break
                assert isinstance(received.body, ShareHandles)
                found[slot] += [one.id for one in received.body.handles]
            assert found[slot] == list(received.body.kv), "what it names comes first"
    assert pair.subject.turn_ms(500) == 500


def test_nothing_is_shared_any_more_for_a_rank_that_ended_meanwhile(pair: Pair) -> None:
    device = Keys()
    pair.subject.update(pair.rank, *device.offer(0, 3))
    pair.channel.close()
    assert wait_until(pair.take, "the end is seen") == [0]
    assert len(device.asked) == HANDLES_MAX
    assert pair.subject.turn_ms(500) == 500


@pytest.mark.parametrize("error", [REFUSED, DoesNotFit("the device's memory is short")], ids=["refused", "short"])
def test_a_handle_that_is_not_shared_later_ends_the_rank_and_nobody_else(pair: Pair, error: ElasticMoEError) -> None:
    device = Keys(HANDLES_MAX + 1, error)
    pair.subject.update(pair.rank, *device.offer(0, 3))
    assert pair.take() == []
    assert len(device.asked) == HANDLES_MAX + 1
    assert wait_until(pair.take, "the end is seen") == [0]
    assert len(device.asked) == HANDLES_MAX + 1
    pair.read_first()
    assert isinstance(pair.channel.receive()[0].body, ShareHandles)
    with pytest.raises(Unavailable):
        pair.channel.receive()
