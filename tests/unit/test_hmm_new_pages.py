"""Large pages for memory that is claimed and not made yet: which are made, by whom, and what a refusal leaves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from elasticmoe.cli.doctor import can_collapse
from elasticmoe.common.devices.base import Handle, ProcessRules, Range
from elasticmoe.common.devices.factory import open_device
from elasticmoe.common.devices.host import HostDevice
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol.errors import DoesNotFit, Unavailable
from elasticmoe.services.hmm.memory import new_pages
from elasticmoe.services.hmm.memory.memory import DeviceMemory
from elasticmoe.services.hmm.memory.new_pages import NewPages, make_zeros
from tests.claims import make_record

PAGE, LARGE = 4096, 2 << 20
EXPERT = LARGE + 188 * PAGE  # no multiple of a large page
NUM = 6

Asked = list[tuple[int, int]]


@pytest.fixture
def memory() -> Iterator[DeviceMemory]:
    device = open_device("host:0", PAGE, 64 << 20, rules=ProcessRules())
    yield DeviceMemory(device)
    device.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What a device is asked for, as (offset, bytes)."""
    seen, make = Asked(), HostDevice.make_large

    def noted(self: HostDevice, range_: Range, offset: int, nbytes: int) -> bool:
        seen.append((offset, nbytes))
        return make(self, range_, offset, nbytes)

    monkeypatch.setattr(HostDevice, "make_large", noted)
    return seen


def claim_experts(memory: DeviceMemory, count: int = NUM, first: int = 0) -> list[tuple[DeviceMemory, Handle]]:
    numbers = range(first, first + count)
    return [(memory, memory.claim_record(RecordKey("expert", 0, number), EXPERT)) for number in numbers]


def test_each_large_page_is_made_once_before_what_it_holds(memory: DeviceMemory, asked: Asked) -> None:
    claimed = claim_experts(memory)
    pages = NewPages(claimed)
    for _, handle in claimed:
        for offset in range(0, EXPERT, PAGE * 47):
            pages.make(handle, offset, min(PAGE * 47, EXPERT - offset))
            _, start = memory.where(handle)
            made = {at for begin, nbytes in asked for at in range(begin, begin + nbytes, LARGE)}
            holds = (start + offset) // LARGE * LARGE
            assert holds in made or holds + LARGE > NUM * EXPERT, "what is filled next has its page"
    all_made = [at for begin, nbytes in asked for at in range(begin, begin + nbytes, LARGE)]
    assert all_made == [number * LARGE for number in range(NUM * EXPERT // LARGE)]


def test_nobody_fills_a_page_that_another_thread_is_making(
    memory: DeviceMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second expert begins within the large page in which the first one ends."""
    (_, first), (_, second) = claimed = claim_experts(memory, 2)
    pages, is_begun, may_end = NewPages(claimed), threading.Event(), threading.Event()

    def make(*_: object) -> bool:
        is_begun.set()
        assert may_end.wait(20)
        return True

    monkeypatch.setattr(HostDevice, "make_large", make)
    with ThreadPoolExecutor(2) as threads:
        making = threads.submit(pages.make, first, 0, EXPERT)
        assert is_begun.wait(20)
        filling = threads.submit(pages.make, second, 0, PAGE)
        assert not wait([filling], timeout=0.3).done, "the page is still being made"
        may_end.set()
        making.result(20)
        filling.result(20)


def test_a_making_that_fails_holds_nobody_up(memory: DeviceMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, first), (_, second) = claimed = claim_experts(memory, 2)
    pages = NewPages(claimed)

    def fail(*_: object) -> bool:
        raise DoesNotFit("no memory")

    monkeypatch.setattr(HostDevice, "make_large", fail)
    with pytest.raises(DoesNotFit):
        pages.make(first, 0, EXPERT)
    pages.make(second, 0, PAGE)


def test_a_large_handle_is_made_piece_by_piece(memory: DeviceMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_pages, "_PIECE_BYTES", LARGE)
    asked, num_checks = list[int](), 0
    populate = HostDevice.populate

    def noted(self: HostDevice, handle: Handle, offset: int, nbytes: int) -> None:
        asked.append(nbytes)
        populate(self, handle, offset, nbytes)

    def check() -> None:
        nonlocal num_checks
        num_checks += 1

    monkeypatch.setattr(HostDevice, "populate", noted)
    make_zeros([(memory, memory.claim_kv(3 * LARGE + PAGE))], check)
    assert (asked, num_checks) == ([LARGE] * 3 + [PAGE], 4)


def test_pages_that_others_have_a_part_of_stay_small(memory: DeviceMemory, asked: Asked) -> None:
    before = make_record(memory, RecordKey("expert", 0, 0), EXPERT)
    memory.device.write_bytes(memory.address(before), b"\x07" * EXPERT)
    claimed = claim_experts(memory, 3, first=1)
    make_zeros(claimed, lambda: None)
    assert min(at for at, _ in asked) == 2 * LARGE  # the first expert ends within the second large page
    assert memory.device.read_bytes(memory.address(before), EXPERT) == b"\x07" * EXPERT
    assert memory.device.pages == memory.device.used["weights"] == 4 * EXPERT
    assert memory.device.check_integrity() == []


def test_what_is_made_large_is_zeros_and_takes_what_is_written(memory: DeviceMemory) -> None:
    claimed = claim_experts(memory)
    make_zeros(claimed, lambda: None)
    for number, (_, handle) in enumerate(claimed):
        address = memory.address(handle)
        assert memory.device.read_bytes(address, EXPERT) == bytes(EXPERT)
        memory.device.write_bytes(address, bytes([number + 1]) * EXPERT)
    memory.release(memory.records.pop(RecordKey("expert", 0, 2)))  # its neighbours share large pages with it
    for number, (_, handle) in enumerate(claimed):
        if number != 2:
            assert memory.device.read_bytes(memory.address(handle), EXPERT) == bytes([number + 1]) * EXPERT
    assert memory.device.pages == sum(memory.device.used.values()) == (NUM - 1) * EXPERT


@pytest.mark.skipif(not can_collapse(), reason="this kernel makes no large pages of small ones")
def test_a_file_is_read_into_large_pages_and_into_small_ones_alike(memory: DeviceMemory) -> None:
    claimed = claim_experts(memory, 2)
    make_zeros(claimed, lambda: None)
    device, (_, first), (_, second) = memory.device, *claimed
    assert isinstance(device, HostDevice)
    content = bytes(range(251)) * (2 * EXPERT // 251 + 1)
    source = open_device("host:1", PAGE, 16 << 20, rules=ProcessRules())
    from_file = DeviceMemory(source, has_large=False)
    handle = make_record(from_file, RecordKey("expert", 0, 0), 2 * EXPERT)
    source.write_bytes(from_file.address(handle), content[: 2 * EXPERT])
    token = source.export(handle)
    for at in range(0, 2 * EXPERT, 300 << 10):  # across both handles, and past the last large page
        nbytes = min(300 << 10, 2 * EXPERT - at)
        device.read_into(memory.address(first) + at, token.fd, handle.place + at, nbytes)  # type: ignore[union-attr]
    assert device.read_bytes(memory.address(first), 2 * EXPERT) == content[: 2 * EXPERT]
    assert memory.address(second) == memory.address(first) + EXPERT
    source.close()


def test_the_first_refusal_leaves_the_rest_to_small_pages(
    memory: DeviceMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = Asked()

    def refuse(_: HostDevice, __: Range, offset: int, nbytes: int) -> bool:
        refused.append((offset, nbytes))
        return False

    monkeypatch.setattr(HostDevice, "make_large", refuse)
    claimed = claim_experts(memory)
    pages = NewPages(claimed)
    for _, handle in claimed:
        pages.make(handle, 0, EXPERT)
    assert refused == [(0, 2 * LARGE)]  # what the first one holds a part of
    for _, handle in claimed:
        memory.device.populate(handle, 0, EXPERT)
        memory.device.settle(handle)
    assert memory.device.pages == NUM * EXPERT


def test_none_are_made_where_they_are_not_wanted(asked: Asked) -> None:
    device = open_device("host:0", PAGE, 64 << 20, rules=ProcessRules())
    memory = DeviceMemory(device, has_large=False)
    make_zeros(claim_experts(memory), lambda: None)
    assert asked == []
    assert device.pages == NUM * EXPERT
    device.close()


@pytest.mark.parametrize("error", [DoesNotFit("no memory"), Unavailable("the load was aborted", code="aborted")])
def test_what_ends_the_making_leaves_claims_that_can_be_given_back(
    memory: DeviceMemory, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    num_asked = 0

    def fail(*_: object) -> bool:
        nonlocal num_asked
        num_asked += 1
        raise error

    monkeypatch.setattr(HostDevice, "make_large", fail)
    claimed = claim_experts(memory, 12)
    with pytest.raises(type(error)):
        make_zeros(claimed, lambda: None)
    assert num_asked < len(claimed), "nobody goes on with the rest"
    memory.clear()
    assert (memory.device.pages, memory.device.free) == (0, memory.device.budget)
