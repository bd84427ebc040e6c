"""Memory in and out of a transition: claimed handles, threads that fill them, limits, stops, and copies of blocks."""

from __future__ import annotations

import errno
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from elasticmoe.common.devices.accelerator import AcceleratorDevice
from elasticmoe.common.devices.base import Completion, Handle, Space
from elasticmoe.common.devices.factory import open_device
from elasticmoe.common.devices.rules import ProcessRules
from elasticmoe.common.model_spec import KvGeometry, RecordKey
from elasticmoe.common.protocol.errors import (
    Conflict,
    DoesNotFit,
    ElasticMoEError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from elasticmoe.common.protocol.hmm import CopyBlocks, RecordCopy
from elasticmoe.common.telemetry import get_logger
from elasticmoe.native import host
from elasticmoe.services.hmm.background import Background
from elasticmoe.services.hmm.memory import blocks as blocks_module
from elasticmoe.services.hmm.memory import transfer as transfer_module
from elasticmoe.services.hmm.memory.blocks import BlockCopies, check_ranks
from elasticmoe.services.hmm.memory.claims import HandlePart
from elasticmoe.services.hmm.memory.memory import DeviceMemory
from elasticmoe.services.hmm.memory.transfer import Peaks, Supply, Transfer
from elasticmoe.services.hmm.parts import Parts
from elasticmoe.services.hmm.service import Hmm
from tests.claims import make_kv, make_record
from tests.clocks import PlayedClock
from tests.devices.backends import granularity
from tests.unit.specs import tiny_mixtral_spec

__all__ = ["granularity"]

SPEC = tiny_mixtral_spec()
RECORD = 2 << 20
KV_HANDLE = 2 << 20


@pytest.fixture
def memories(granularity: int) -> Iterator[dict[str, DeviceMemory]]:
    rules = ProcessRules()
    made = {
        f"host:{i}": DeviceMemory(open_device(f"host:{i}", granularity, 64 * RECORD, rules=rules)) for i in range(3)
    }
    yield made
    for memory in made.values():
        memory.device.close()


@pytest.fixture
def background() -> Iterator[Background]:
    made = Background(get_logger("test"))
    yield made
    assert made.join(60)
    made.close()


def finish(background: Background, condition: Callable[[], bool]) -> None:
    """Be the loop until `condition`."""
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline, "the jobs do not end"
        background.join(0.01)
        background.finish()


def sources(memory: DeviceMemory, count: int) -> list[Handle]:
    """Records with some content."""
    for number in range(count):
        key = RecordKey("expert", 0, number)
        make_record(memory, key, RECORD)
        memory.device.write_bytes(memory.address(memory.records[key]), bytes([number + 1]) * RECORD)
    return list(memory.records.values())


def parts_of(memories: dict[str, DeviceMemory], handles: list[Handle]) -> list[HandlePart]:
    """Copies of these handles of host:0 to the two other devices."""
    source = memories["host:0"]
    return [
        HandlePart(
            memories[name],
            memories[name].claim(RECORD, "weights", 0),
            RecordCopy(RecordKey("expert", 0, number), "host:0", name),
            (source, handle),
        )
        for name in ("host:1", "host:2")
        for number, handle in enumerate(handles)
    ]


def is_equal_to_its_source(part: HandlePart) -> bool:
    assert part.source is not None
    memory, handle = part.source
    copied = part.memory.device.checksum(part.memory.address(part.handle), RECORD)
    return copied == memory.device.checksum(memory.address(handle), RECORD)


def transfer_of(parts: list[HandlePart], limit: int = 0) -> Transfer:
    return Transfer(parts, limit, Peaks(), SPEC, "/nowhere")


def test_claimed_handles_are_counted_at_once_and_get_pages_as_they_are_filled(
    memories: dict[str, DeviceMemory],
) -> None:
    parts = parts_of(memories, sources(memories["host:0"], 3))
    device = memories["host:1"].device
    at_once = 3 * RECORD if isinstance(device, AcceleratorDevice) else 0  # there a handle's memory comes with it
    assert (device.used["weights"], device.pages) == (3 * RECORD, at_once)
    assert device.check_integrity() == []  # pages of claimed handles may be absent
    transfer = transfer_of(parts)
    assert (transfer.num_threads, transfer.bytes_total) == (2, 6 * RECORD)
    transfer.run()
    assert transfer.bytes_done == 6 * RECORD
    for part in parts[:3]:
        assert is_equal_to_its_source(part)
        device.settle(part.handle)
    assert device.pages == 3 * RECORD
    assert device.check_integrity() == []


def test_two_threads_share_what_one_device_needs(memories: dict[str, DeviceMemory], background: Background) -> None:
    parts = parts_of(memories, sources(memories["host:0"], 5))[:5]
    memory = memories["host:1"]
    zeros = HandlePart(memory, memory.claim(4 * RECORD, "kv", 0))
    peaks = Peaks()
    transfer = Transfer([*parts, zeros], 0, peaks, SPEC, "/nowhere")
    assert transfer.num_threads == 2
    ended: list[ElasticMoEError | None] = []
    for _ in range(transfer.num_threads):
        background.start("transfer", transfer.run, ended.append)
    finish(background, lambda: len(ended) == 2)
    assert ended == [None, None]
    assert transfer.bytes_done == transfer.bytes_total == 5 * RECORD
    assert all(is_equal_to_its_source(part) for part in parts)
    assert peaks.by_device == {"host:1": memory.device.pages} == {"host:1": 9 * RECORD}


def test_a_limit_is_kept_by_one_thread(
    memories: dict[str, DeviceMemory],
) -> None:
    transfer = transfer_of(parts_of(memories, sources(memories["host:0"], 1)), limit=16 << 20)
    assert transfer.num_threads == 1
    started = time.monotonic()
    transfer.run()
    assert time.monotonic() - started >= 2 * RECORD / (16 << 20)  # two records


def test_a_transfer_can_be_stopped_while_it_sleeps(memories: dict[str, DeviceMemory]) -> None:
    transfer = transfer_of(parts_of(memories, sources(memories["host:0"], 1)), limit=1)  # days, at this rate
    caught: list[BaseException] = []

    def run() -> None:
        try:
            transfer.run()
        except Unavailable as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    transfer.stop()
    thread.join(60)
    assert [getattr(error, "code", "") for error in caught] == ["aborted"]


@pytest.mark.parametrize("granularity", ["host"], indirect=True)  # whose memory can be made to fail
def test_a_machine_without_memory_fails_the_transfer_and_all_is_given_back(
    memories: dict[str, DeviceMemory], background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    holdings: Any = SimpleNamespace(memories=memories, granularity=4096)
    loaded: Any = SimpleNamespace(
        spec=SPEC, load=SimpleNamespace(model_path="/nowhere"), kv=KvGeometry(16, RECORD, RECORD, 1, RECORD)
    )
    supply, errors = Supply(holdings, background), []
    allocate, num_calls = host.allocate, 0

    def fail(fd: int, offset: int, nbytes: int) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 3:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        allocate(fd, offset, nbytes)

    supply.begin()
    assert supply.claim_kv([(memories[name], 4) for name in ("host:1", "host:2")], loaded)
    monkeypatch.setattr(host, "allocate", fail)
    supply.start(0, loaded, errors.append)
    finish(background, lambda: bool(errors))
    assert isinstance(errors[0], DoesNotFit)
    supply.drop_claims()
    finish(background, lambda: not supply.is_releasing)
    for memory in memories.values():
        assert (memory.device.pages, memory.device.free) == (0, memory.device.budget)
        assert memory.device.check_integrity() == []
    most = (3 + 2) * RECORD  # each thread has made the large page of what failed
    assert 0 < sum(supply.peaks.by_device.values()) <= most


def test_kv_is_claimed_where_its_rank_will_map_it(
    memories: dict[str, DeviceMemory], background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, asked = memories["host:1"], list[int]()
    claim = memory.claim

    def noted(nbytes: int, space: Space, at: int = 0) -> Handle:
        asked.append(at)
        return claim(nbytes, space, at)

    monkeypatch.setattr(memory, "claim", noted)
    holdings: Any = SimpleNamespace(memories=memories, granularity=4096)
    loaded: Any = SimpleNamespace(kv=KvGeometry(16, RECORD, RECORD, 1, RECORD))
    supply = Supply(holdings, background)
    make_kv(memory, RECORD)
    supply._claims.append(HandlePart(memory, memory.claim(RECORD, "mailbox")))  # comes first, and is no KV
    for _ in range(2):
        assert supply.claim_kv([(memory, 2)], loaded)
    mailbox = 0
    assert asked == [0, mailbox, *(number * RECORD for number in range(1, 5))]


def test_thousands_of_handles_are_claimed_some_at_a_time_and_given_back_wherever_that_ends(
    memories: dict[str, DeviceMemory], background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_module, "CLAIMS_MAX", 2)
    holdings: Any = SimpleNamespace(memories=memories, granularity=4096)
    loaded: Any = SimpleNamespace(kv=KvGeometry(16, RECORD, RECORD, 1, RECORD))
    supply, wanted = Supply(holdings, background), [(memories["host:1"], 3), (memories["host:2"], 62)]

    def used() -> list[int]:
        return [memory.device.used["kv"] // RECORD for memory, _ in wanted]

    found = []
    while not supply.claim_kv(wanted, loaded):
        assert supply.is_claiming
        found.append(used())
    assert (found[:3], used()) == ([[2, 0], [3, 1], [3, 3]], [3, 62])
    assert not supply.is_claiming
    more = [(memories["host:1"], 3), (memories["host:2"], 3)]  # of which the other one has room for two
    assert not any(supply.claim_kv(more, loaded) for _ in range(2))
    with pytest.raises(DoesNotFit):
        supply.claim_kv(more, loaded)
    supply.drop_claims()
    assert not supply.is_claiming
    finish(background, lambda: not supply.is_releasing)
    assert used() == [0, 0]


def test_the_hmms_loop_does_not_sleep_while_something_is_still_to_be_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, supply = list[int](), SimpleNamespace(is_claiming=True)

    def poll(timeout_ms: int) -> set[int]:
        waits.append(timeout_ms)
        supply.is_claiming = False
        return set()

    part = SimpleNamespace(
        fileno=lambda: -1, fds=set, is_connected=False, by_slot={}, turn_ms=lambda otherwise: otherwise
    )
    server = SimpleNamespace(poll=poll, watch=lambda _: None)
    parts: dict[str, Any] = dict.fromkeys(Parts._fields, part)
    hmm = Hmm(Parts(**parts | {"supply": supply, "server": server, "log": get_logger("test")}))
    monkeypatch.setattr(hmm, "turn", lambda _: hmm.stop() if len(waits) == 2 else None)
    hmm.run()
    assert waits == [0, 500]


def test_a_claim_beyond_the_budget_is_refused(memories: dict[str, DeviceMemory]) -> None:
    with pytest.raises(DoesNotFit, match="do not fit"):
        memories["host:0"].claim(65 * RECORD, "kv", 0)
    assert memories["host:0"].device.free == 64 * RECORD


# ---- Blocks

STRIDE = KV_HANDLE // 4
GEOMETRY = KvGeometry(16, 1000, STRIDE, 4, KV_HANDLE)


NUMBERS = itertools.count(1)


def request(*pairs: tuple[int, int], source: int = 0, target: int = 1, until: float = math.inf) -> CopyBlocks:
    return CopyBlocks(source, "a", target, "b", next(NUMBERS), until, pairs)


def with_kv(memories: dict[str, DeviceMemory]) -> tuple[DeviceMemory, DeviceMemory]:
    for name in ("host:0", "host:1"):
        for _ in range(2):
            make_kv(memories[name], KV_HANDLE)
    return memories["host:0"], memories["host:1"]


def test_blocks_go_where_the_geometry_says(memories: dict[str, DeviceMemory], background: Background) -> None:
    source, target = with_kv(memories)
    source.device.write_bytes(source.address(source.kv[1]) + STRIDE, b"x" * 1000)
    copies, ended = BlockCopies(background), []
    copies.start(request((5, 2)), [(source, target)], GEOMETRY, ended.append)
    assert copies.is_busy("host:0")
    assert copies.is_busy("host:1")
    finish(background, lambda: bool(ended))
    assert ended == [None]
    assert not copies.is_busy("host:0")
    assert target.device.read_bytes(target.address(target.kv[0]) + 2 * STRIDE, 1024) == b"x" * 1000 + bytes(24)
    for pair in ((8, 0), (0, 8)):
        with pytest.raises(InvalidRequest, match="block 8 is not one of the 8"):
            copies.start(request(pair), [(source, target)], GEOMETRY, ended.append)


def test_a_copy_ends_with_either_rank_and_the_slot_is_free_only_then(
    memories: dict[str, DeviceMemory], background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = with_kv(memories)
    began, go_on, num_copied = threading.Semaphore(0), threading.Event(), 0

    class Slow(Completion):
        def is_done(self) -> bool:
            return go_on.is_set()

        def wait(self) -> None:
            nonlocal num_copied
            num_copied += 1
            began.release()
            assert go_on.wait(60)

    monkeypatch.setattr(target.device, "_copy_async", lambda _: Slow())
    monkeypatch.setattr(blocks_module, "COPY_BYTES", 1)  # one block at a time
    monkeypatch.setattr(blocks_module, "RUNNING_MAX", 1)
    monkeypatch.setattr(blocks_module, "WAITING_MAX", 1)
    copies = BlockCopies(background)
    ended: list[ElasticMoEError | None] = []
    copies.start(request((0, 0), (1, 1), (2, 2)), [(source, target)], GEOMETRY, ended.append)
    assert began.acquire(timeout=60)
    copies.start(request((3, 3)), [(source, target)], GEOMETRY, ended.append)  # waits
    with pytest.raises(Overloaded):
        copies.start(request((3, 3)), [(source, target)], GEOMETRY, ended.append)
    assert copies.wait_stopped(1, 0.0)  # nobody has stopped it
    copies.stop(1)
    assert [error and error.code for error in ended] == ["stale_incarnation"]  # the one that waited
    assert not copies.wait_stopped(1, 0.0)
    assert copies.wait_stopped(2, 0.0)
    go_on.set()
    assert copies.wait_stopped(1, 10.0)
    finish(background, lambda: len(ended) == 2)
    assert ended[1] is not None
    assert (ended[1].code, num_copied) == ("stale_incarnation", 1)


def test_copies_between_two_ranks_are_done_once_and_in_their_order(
    memories: dict[str, DeviceMemory], background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target writes to the last blocks once the sequence is its own: nothing that was asked for before may come."""
    source, target = with_kv(memories)
    go_on, asked = threading.Event(), []

    class Slow(Completion):
        def is_done(self) -> bool:
            return go_on.is_set()

        def wait(self) -> None:
            assert go_on.wait(60)

    def copy(parts: Sequence[tuple[int, int, int]]) -> Completion:
        asked.append(len(parts))
        return Slow()

    monkeypatch.setattr(target.device, "_copy_async", copy)
    copies, pair = BlockCopies(background), [(source, target)]
    ended: list[str] = []

    def start(name: str, what: CopyBlocks) -> None:
        copies.start(
            what, pair, GEOMETRY, lambda error: ended.append(name if error is None else f"{name} {error.code}")
        )

    first, second = request((0, 0)), request((0, 0), (1, 1))
    start("first", first)
    start("second", second)  # waits for the first one
    start("other", request((0, 0), (1, 1), (2, 2), source=2))  # is of other ranks
    start("first again", first)
    start("second again", second)
    finish(background, lambda: len(asked) == 2)
    assert sorted(asked) == [1, 3]
    go_on.set()
    finish(background, lambda: len(ended) == 5)
    assert asked[2:] == [2]
    assert [name for name in ended if name != "other"] == ["first", "first again", "second", "second again"]
    for late in (first, second):
        with pytest.raises(Conflict) as caught:
            start("late", late)
        assert caught.value.code == "stale_copy"
    copies.stop(0)  # the rank's connection has ended, and it comes again
    with pytest.raises(Conflict):
        start("late", second)  # or another rank takes the slot, and counts anew
    start("next", msgspec.structs.replace(first, source_incarnation="c"))
    finish(background, lambda: len(ended) == 6)
    assert asked[-1] == 1


def test_no_copy_begins_or_goes_on_after_its_time(
    memories: dict[str, DeviceMemory], background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target may have given the place to another sequence by then. A copy waits for as long as it may, also where
    one before it is stuck, and holds up none after it."""
    source, target = with_kv(memories)
    now, go_on, num_asked = [100.0], threading.Event(), 0

    class Slow(Completion):
        def is_done(self) -> bool:
            return go_on.is_set()

        def wait(self) -> None:
            assert go_on.wait(60)

    def copy(_: Sequence[tuple[int, int, int]]) -> Completion:
        nonlocal num_asked
        num_asked += 1
        return Slow()

    monkeypatch.setattr(target.device, "_copy_async", copy)
    monkeypatch.setattr(blocks_module, "COPY_BYTES", 1)  # one block at a time
    copies, pair = BlockCopies(background, PlayedClock(lambda: now[0])), [(source, target)]
    ended: list[str] = []

    def start(name: str, what: CopyBlocks) -> None:
        copies.start(
            what, pair, GEOMETRY, lambda error: ended.append(name if error is None else f"{name} {error.code}")
        )

    end = now[0] + 10.0
    start("running", request((0, 0), (1, 1), until=end))
    start("waiting", request((2, 2), until=end))
    start("later", request((3, 3), until=end + 10.0))
    finish(background, lambda: num_asked == 1)
    now[0] += 10.5
    go_on.set()
    finish(background, lambda: len(ended) == 3)
    assert ended == ["running stale_copy", "waiting stale_copy", "later"]
    assert num_asked == 2


def test_both_ranks_must_be_the_named_ones() -> None:
    first: Any = SimpleNamespace(incarnation="a")
    second: Any = SimpleNamespace(incarnation="b")
    check_ranks(request(), (first, second))
    for ranks in ((second, first), (first, None), (None, second)):
        with pytest.raises(ElasticMoEError) as caught:
            check_ranks(request(), ranks)
        assert caught.value.code == "stale_incarnation"
    with pytest.raises(InvalidRequest):
        check_ranks(request(target=0), (first, first))
