"""Large pages under what is loaded: real memfds of this machine, mapped as a rank maps them, and the HMM's own job."""

from __future__ import annotations

import os
import re
import select
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe.common.devices.base import Device, ProcessRules, Range
from elasticmoe.common.devices.factory import open_device
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.hmm.background import Background
from elasticmoe.services.hmm.memory import large_pages
from elasticmoe.services.hmm.memory.large_pages import RETRY_S, RETRY_S_MAX, LargePages
from elasticmoe.services.hmm.memory.memory import DeviceMemory
from elasticmoe.services.hmm.memory.transfer import Supply
from tests.claims import make_kv, make_record

PAGE = 4096
LARGE = 2 << 20
EXPERT = LARGE + 188 * PAGE  # no multiple of a large page
NUM = 6


@pytest.fixture
def memory() -> Iterator[DeviceMemory]:
    """What a device holds that was loaded: a layer's record, its experts, KV."""
    device = open_device("host:0", PAGE, 64 << 20, rules=ProcessRules())
    made = DeviceMemory(device)
    make_record(made, RecordKey("layer", 0), 3 * PAGE)
    for expert in range(NUM):
        make_record(made, RecordKey("expert", 0, expert), EXPERT)
    for _ in range(2):
        make_kv(made, LARGE + PAGE)
    for number, handle in enumerate((*made.records.values(), *made.kv)):
        device.write_bytes(made.address(handle), bytes([number + 1]) * handle.nbytes)
    yield made
    device.close()


@pytest.fixture
def background() -> Iterator[Background]:
    made = Background(get_logger("test"))
    yield made
    assert made.join(20.0)
    made.close()


def rank_of(memory: DeviceMemory, experts: list[int]) -> tuple[Device, Range]:
    """A rank that has mapped these experts, each at its place of the layer's range."""
    rank = open_device("host:0", PAGE, rules=ProcessRules())
    range_ = rank.reserve(NUM * EXPERT)
    for expert in experts:
        key = RecordKey("expert", 0, expert)
        handle = rank.import_(memory.device.export(memory.records[key]))
        rank.map(range_, key.range_offset(EXPERT), handle, False)
    return rank, range_


def large_bytes(range_: Range) -> int:
    """What of a range this process has in large pages."""
    found = 0
    for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        named = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", part)
        if named and range_.base <= int(named[1], 16) < range_.base + range_.nbytes:
            found += 1024 * int(re.search(r"^ShmemPmdMapped:\s*(\d+) kB", part, re.MULTILINE)[1])  # type: ignore[index]
    return found


def finish(pages: LargePages, background: Background, now: float = 0.0) -> None:
    """Turn as the HMM's loop does, until nothing is left to do at that moment."""
    poller = select.poll()
    poller.register(background.fileno(), select.POLLIN)
    pages.turn(now, is_loading=False)
    while pages.is_at_work:
        assert poller.poll(20_000), "the job never ended"
        background.finish()
        pages.turn(now, is_loading=False)


def holdings_of(memory: DeviceMemory) -> Any:
    return SimpleNamespace(memories={"host:0": memory}, loaded=object(), num_readers=0, transition=None)


def large_pages_of(holdings: Any, background: Background, *, is_wanted: bool = True) -> LargePages:
    supply: Any = SimpleNamespace(is_releasing=False)
    return LargePages(holdings, supply, background, get_logger("test"), is_wanted=is_wanted)


def test_experts_lie_back_to_back_where_their_ranks_map_them(memory: DeviceMemory) -> None:
    places = [memory.records[RecordKey("expert", 0, expert)].place for expert in range(NUM)]
    assert places == [places[0] + expert * EXPERT for expert in range(NUM)]
    assert places[0] % LARGE == 0
    assert [handle.place for handle in memory.kv] == [0, LARGE + PAGE]
    # One that comes back, later, with others around it.
    memory.release(memory.records.pop(RecordKey("expert", 0, 2)))
    again = memory.claim(EXPERT, "weights", 5 * EXPERT)
    assert again.place % LARGE == 5 * EXPERT % LARGE


def test_a_place_that_large_pages_cannot_have_is_better_than_none() -> None:
    device = open_device("host:0", PAGE, LARGE + PAGE, rules=ProcessRules())
    window = device.window_bytes
    held = [device.create(LARGE, "kv", 0)]  # the first place of that phase
    assert held[0].place == 0
    device.release(held.pop())
    device._places["kv"].take(0, window - LARGE - PAGE)
    assert device.create(LARGE, "kv", 5 * PAGE).place == window - LARGE - PAGE
    device.close()


def test_a_rank_sees_the_same_bytes_in_large_pages(memory: DeviceMemory, background: Background) -> None:
    rank, range_ = rank_of(memory, [0, 1, 2, 4])
    before = rank.read_bytes(range_.base, 3 * EXPERT)
    holdings = holdings_of(memory)
    pages = large_pages_of(holdings, background)
    finish(pages, background)
    assert holdings.num_readers == 0
    assert pages.large.total() + pages.bytes_refused == sum(nbytes for _, _, nbytes in memory.large_parts()) > 0
    assert rank.read_bytes(range_.base, 3 * EXPERT) == before
    assert rank.read_bytes(range_.address(4 * EXPERT), EXPERT) == bytes([6]) * EXPERT
    assert memory.device.check_integrity() == []
    assert memory.device.pages == sum(memory.device.used.values())
    got, most = large_bytes(range_), 3 * EXPERT // LARGE * LARGE
    rank.close()
    if pages.bytes_refused:
        pytest.skip(f"the kernel gave {pages.large.total()} bytes in large pages and refused {pages.bytes_refused}")
    assert got >= most, f"{got} bytes are in large pages, {most} could be"


def test_what_leaves_gives_all_its_pages_back(memory: DeviceMemory, background: Background) -> None:
    finish(large_pages_of(holdings_of(memory), background), background)
    for expert in (1, 4):
        memory.release(memory.records.pop(RecordKey("expert", 0, expert)))
        assert memory.device.pages == sum(memory.device.used.values())
    for expert in (0, 2, 3, 5):  # the neighbours, which shared large pages with those
        handle = memory.records[RecordKey("expert", 0, expert)]
        assert memory.device.read_bytes(memory.address(handle), EXPERT) == bytes([expert + 2]) * EXPERT


def test_what_the_kernel_cannot_let_go_is_given_back_later(memory: DeviceMemory, background: Background) -> None:
    """A large page of which somebody holds the other half: it is not split, so the released half stays there."""
    finish(large_pages_of(holdings_of(memory), background), background)
    device, kept = memory.device, memory.records[RecordKey("expert", 0, 1)]
    pipe = os.pipe()
    try:  # the pipe holds the page itself, not a copy
        os.splice(device.descriptors()["weights"], pipe[1], PAGE, offset_src=kept.place + kept.nbytes - PAGE)
        memory.release(memory.records.pop(RecordKey("expert", 0, 2)))
        used = sum(device.used.values())
        if device.pages == used:
            pytest.skip("the kernel gave no large page across two records")
        assert device.has_leftovers
        supply = Supply(holdings_of(memory), background)
        supply.give_back_leftovers()
        assert device.has_leftovers
        assert device.pages > used
    finally:
        os.close(pipe[0])
        os.close(pipe[1])
    supply.give_back_leftovers()
    assert not device.has_leftovers
    assert device.pages == used
    assert device.read_bytes(memory.address(kept), EXPERT) == bytes([3]) * EXPERT
    assert device.check_integrity() == []


def test_nothing_is_begun_while_memory_changes_hands(
    memory: DeviceMemory, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_pages, "PIECE_BYTES", LARGE)
    holdings = holdings_of(memory)
    pages = large_pages_of(holdings, background)
    pages.turn(0.0, is_loading=True)
    assert not pages.is_at_work
    pages.turn(0.0, is_loading=False)
    assert pages.is_at_work
    assert holdings.num_readers == 1
    pages.turn(0.0, is_loading=True)  # the piece in work is ended, no other one begins
    assert background.join(20.0)
    background.finish()
    assert not pages.is_at_work
    assert holdings.num_readers == 0
    for busy in ("transition", "release"):
        holdings.transition = SimpleNamespace(is_over=busy != "transition")
        pages._supply = SimpleNamespace(is_releasing=busy == "release")  # type: ignore[assignment]
        pages.turn(0.0, is_loading=False)
        assert not pages.is_at_work
    pages._supply = SimpleNamespace(is_releasing=False)  # type: ignore[assignment]
    finish(pages, background)  # and all of it afterwards
    assert pages.large.total() + pages.bytes_refused == sum(nbytes for _, _, nbytes in memory.large_parts())


def test_who_wants_none_gets_none(memory: DeviceMemory, background: Background) -> None:
    pages = large_pages_of(holdings_of(memory), background, is_wanted=False)
    pages.turn(0.0, is_loading=False)
    assert not pages.is_at_work


def test_the_threads_priority_is_its_own(memory: DeviceMemory, background: Background) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    finish(large_pages_of(holdings_of(memory), background), background)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


class Kernel:
    """In place of a device and its four pieces of memory. `refuses`: pieces that it does not collapse now."""

    def __init__(self) -> None:
        self.refuses = {0, 1, 2, 3}
        self.asked: list[int] = []

    def collapse(self, _: Range, offset: int, nbytes: int) -> bool:
        assert nbytes == large_pages.PIECE_BYTES
        self.asked.append(offset // nbytes)
        return self.asked[-1] not in self.refuses

    def holdings(self) -> Any:
        parts = [(None, 0, 4 * large_pages.PIECE_BYTES)]
        memory: Any = SimpleNamespace(large_parts=lambda: parts, device=self)
        return holdings_of(memory)


def test_what_was_refused_is_tried_again_after_pauses_that_grow(background: Background) -> None:
    kernel = Kernel()
    holdings = kernel.holdings()
    pages = large_pages_of(holdings, background)

    def asked_at(now: float) -> list[int]:
        kernel.asked.clear()
        finish(pages, background, now)
        return list(kernel.asked)

    assert asked_at(100.0) == [0, 1, 2, 3]
    assert asked_at(100.0 + RETRY_S - 0.1) == []
    assert asked_at(100.0 + RETRY_S) == [0], "where one is refused again, so are the others for the most part"
    assert asked_at(100.0 + 3 * RETRY_S - 0.1) == []
    assert asked_at(100.0 + 3 * RETRY_S) == [1]
    kernel.refuses = {0}
    assert asked_at(200.0) == [2, 3, 0]
    assert asked_at(200.0 + RETRY_S) == [1, 0], "something was gained"
    one = large_pages.PIECE_BYTES
    assert (pages.large["host:0"], pages.bytes_refused) == (3 * one, one)
    now, pauses = 200.0 + 2 * RETRY_S, []
    assert asked_at(now) == [0]
    for pause in (2 * RETRY_S, 4 * RETRY_S, 8 * RETRY_S, 16 * RETRY_S, RETRY_S_MAX, RETRY_S_MAX):
        assert asked_at(now + pause - 0.1) == []
        now += pause
        pauses.append(asked_at(now))
    assert pauses == [[0]] * 6
    holdings.loaded = object()  # memory has changed hands
    assert asked_at(now) == [0, 1, 2, 3]
    kernel.refuses.clear()
    assert asked_at(now + RETRY_S) == [0]
    assert (pages.large["host:0"], pages.bytes_refused) == (4 * one, 0)
    assert asked_at(now + 1_000.0) == []


def test_what_was_refused_is_left_alone_while_memory_changes_hands(background: Background) -> None:
    kernel = Kernel()
    pages = large_pages_of(kernel.holdings(), background)
    finish(pages, background)
    pages.turn(2 * RETRY_S, is_loading=True)
    assert not pages.is_at_work
    assert kernel.asked == [0, 1, 2, 3]
