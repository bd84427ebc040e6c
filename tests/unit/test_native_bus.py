"""elasticmoe.native.bus: membership, barriers and the token exchange between the threads of one process."""

import ctypes
import mmap
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from elasticmoe.native.bus import MAX_RANKS, Bus, BusAborted, BusDesync, BusTimeout, bus_bytes, format_bus, make_routing
from tests.unit.threads import at_once

SHAPE = (4, 6, 32, 3)  # ranks, tokens, hidden, top_k
NUM_EXPERTS = 10
LONG_MS = 30_000


class Segment:
    def __init__(self) -> None:
        self.nbytes = bus_bytes(*SHAPE)
        self.memory = mmap.mmap(-1, self.nbytes)
        self.view = (ctypes.c_char * self.nbytes).from_buffer(self.memory)
        self.addr = ctypes.addressof(self.view)
        format_bus(self.addr, self.nbytes, *SHAPE)

    def open(self, slot: int = -1) -> Bus:
        return Bus(self.addr, self.nbytes, slot)

    def join(self, slot: int, incarnation: int = 1) -> Bus:
        bus = self.open(slot)
        bus.join(incarnation)
        return bus

    def close(self) -> None:
        del self.view
        self.memory.close()


def test_its_errors_say_where_they_can_be_imported_from() -> None:
    assert {error.__module__ for error in (BusAborted, BusDesync, BusTimeout)} == {Bus.__module__}


def dispatch_nothing(bus: Bus, deadline_ms: float) -> int:
    """The meeting of a dispatch to which this rank brings no tokens, in generation 1."""
    counts = np.empty(1, np.int32)
    return bus.dispatch(make_routing([0]), 1, 0, 0, 0, 0, 0, 0, counts.ctypes.data, deadline_ms)


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment()
    yield segment
    segment.close()


def test_geometry_is_read_back(segment):
    bus = segment.open(2)
    assert (bus.max_ranks, bus.max_tokens, bus.hidden, bus.top_k) == SHAPE
    assert bus.slot == 2
    assert segment.open().slot == -1
    assert MAX_RANKS == 64


def test_membership_only_grows(segment):
    hmm = segment.open()
    assert hmm.membership() == (0, 0, False, 0)
    hmm.set_membership(5, 0b11, True, 2**64 - 1)
    assert segment.open(1).membership() == (5, 0b11, True, 2**64 - 1)
    for generation, members in [(5, 1), (4, 1), (6, 1 << 4), (2**32, 1)]:
        with pytest.raises(ValueError):
            hmm.set_membership(generation, members, True)
    hmm.set_membership(6, 0b1, False)
    assert hmm.membership() == (6, 0b1, False, 0)


def test_a_staged_membership_is_flipped_to(segment):
    hmm, rank = segment.open(), segment.open(1)
    assert rank.staged() == (0, 0, 0)
    with pytest.raises(ValueError, match="not running"):
        hmm.stage_membership(1, 0b1, 1)
    hmm.set_membership(1, 0b1, True, 7)
    for generation, members in [(1, 1), (2, 1 << 4), (2**32, 1), (-1, 1)]:
        with pytest.raises(ValueError):
            hmm.stage_membership(generation, members, 8)
    hmm.stage_membership(2, 0b11, 8)
    hmm.stage_membership(2, 0b11, 8)
    with pytest.raises(ValueError, match="staged already"):
        hmm.stage_membership(3, 0b11, 8)
    assert rank.staged() == (2, 0b11, 8)
    assert rank.membership() == (1, 0b1, True, 7)
    assert rank.flip(3) is False
    assert rank.flip(2) is True
    assert hmm.flip(2) is True
    assert rank.membership() == (2, 0b11, True, 8)
    assert rank.staged() == (0, 0, 0)


@pytest.mark.parametrize("is_running", [False, True])
def test_publishing_makes_the_staged_membership_void(segment, is_running):
    hmm, rank = segment.open(), segment.open(1)
    hmm.set_membership(1, 0b1, True, 7)
    hmm.stage_membership(3, 0b11, 8)
    hmm.set_membership(2, 0b1, is_running, 7)
    assert rank.staged() == (0, 0, 0)
    assert rank.flip(3) is False
    hmm.set_membership(3, 0b1, True, 7)
    assert rank.staged() == (0, 0, 0)
    assert rank.membership() == (3, 0b1, True, 7)
    hmm.stage_membership(4, 0b11, 8)
    assert rank.flip(4) is True
    with pytest.raises(ValueError, match="greater"):
        hmm.set_membership(4, 0b1, False)  # the flip was faster
    assert hmm.membership() == (4, 0b11, True, 8)


def test_members_flip_in_step(segment):
    """One rank goes, one comes; each computes every step of both generations but the one that flips."""
    hmm = segment.open()
    hmm.set_membership(1, 0b011, True, 1)
    has_flipped = threading.Event()

    def run(slot, steps):
        rank = segment.join(slot)
        steps_by_epoch = dict.fromkeys((1, 2), 0)
        generation, members, _, epoch = rank.membership()
        while not members >> slot & 1:
            assert has_flipped.wait(LONG_MS / 1e3)
            generation, members, _, epoch = rank.membership()
        while members >> slot & 1 and steps_by_epoch[2] < steps:
            staged = rank.staged()[0]
            try:
                entries = rank.step(generation, 1, staged, LONG_MS)
            except BusAborted:
                generation, members, _, epoch = rank.membership()
                continue
            if staged and all(flags == staged for _, _, flags in entries):
                assert rank.flip(staged)
                has_flipped.set()
                generation, members, _, epoch = rank.membership()
                continue
            steps_by_epoch[epoch] += 1
            if slot == 0 and steps_by_epoch[1] == steps and epoch == 1:
                hmm.stage_membership(2, 0b101, 2)
        return steps_by_epoch

    first, leaving, joining = at_once(*(lambda slot=slot: run(slot, 30) for slot in (0, 1, 2)))
    assert first[1] == leaving[1] >= 30
    assert (first[2], leaving[2], joining) == (30, 0, {1: 0, 2: 30})


def test_slots_are_taken_counted_and_left(segment):
    hmm, rank = segment.open(), segment.join(3, incarnation=2**63 + 1)
    rank.bump_progress()
    rank.bump_progress()
    assert hmm.progress(3) == 2
    assert not hmm.is_waiting_for_device(3)
    rank.set_waiting_for_device(True)
    assert [hmm.is_waiting_for_device(slot) for slot in range(4)] == [False, False, False, True]
    segment.join(3, incarnation=7)  # it died of it
    assert not hmm.is_waiting_for_device(3)
    leaving = segment.join(3, incarnation=2**63 + 1)
    leaving.leave()
    hmm.set_membership(1, 0b1000, True)
    with pytest.raises(ValueError, match="not been joined"):
        leaving.step(1, 0, 0, 0)
    for call in (hmm.progress, hmm.is_waiting_for_device):
        with pytest.raises(ValueError):
            call(4)
    with pytest.raises(ValueError):
        hmm.join(1)


def test_steps_tell_everybody_everything(segment):
    segment.open().set_membership(1, 0b1011, True)
    slots = (0, 1, 3)

    def work(slot):
        rank = segment.join(slot)
        return [rank.step(1, slot * 10 + n, n, LONG_MS) for n in range(50)]

    expected = [[(slot, slot * 10 + n, n) for slot in slots] for n in range(50)]
    assert at_once(*(lambda slot=slot: work(slot) for slot in slots)) == [expected] * 3


def test_a_step_may_time_out_and_go_on(segment):
    segment.open().set_membership(1, 0b11, True)
    first, second = segment.join(0), segment.join(1)
    with pytest.raises(BusTimeout):
        first.step(1, 5, 6, 1)
    with pytest.raises(TimeoutError):
        first.step(1, 0, 0, 1)
    with pytest.raises(ValueError, match="timed out"):
        dispatch_nothing(first, 1)
    assert second.step(1, 7, 8, 1) == [(0, 5, 6), (1, 7, 8)]
    assert first.step(1, 0, 0, 1) == [(0, 5, 6), (1, 7, 8)]
    assert first.take_wait_ns() > 1_000_000
    assert first.take_exchange_ns() > 1_000_000
    assert first.take_wait_ns() == first.take_exchange_ns() == 0


def test_a_new_generation_frees_waiters(segment):
    hmm = segment.open()
    hmm.set_membership(1, 0b11, True)
    rank, peer = segment.join(0), segment.join(1)

    def publish():
        assert peer.idle_wait(1, LONG_MS)  # the rank waits
        hmm.set_membership(2, 0b11, False)

    error, _ = at_once(lambda: rank.step(1, 0, 0, LONG_MS), publish)
    assert isinstance(error, BusAborted)
    assert error.generation == 2
    with pytest.raises(BusAborted, match="generation 2 is over"):
        rank.step(2, 0, 0, LONG_MS)
    with pytest.raises(BusAborted):
        rank.idle_wait(2, LONG_MS)


def test_a_successor_fences_its_predecessor(segment):
    hmm = segment.open()
    hmm.set_membership(1, 0b1, True)
    old = segment.join(0, 1)
    old.step(1, 0, 0, 0)
    young = segment.join(0, 2)
    with pytest.raises(BusAborted):
        old.step(1, 0, 0, 0)
    hmm.set_membership(2, 0b1, True)
    with pytest.raises(BusAborted):
        old.step(2, 0, 0, 0)
    young.step(2, 0, 0, 0)


def test_misuse_is_refused(segment):
    segment.open().set_membership(1, 0b1, True)
    for work in (
        lambda: segment.open(0).step(1, 0, 0, 0),  # not joined
        lambda: segment.open().step(1, 0, 0, 0),  # an observer
        lambda: segment.join(1).step(1, 0, 0, 0),  # no member
        lambda: segment.join(0).step(-1, 0, 0, 0),
        lambda: segment.join(0).step(1, 0, 0, float("nan")),
        lambda: segment.join(0).step(1, 0, 0, -1),
        lambda: segment.join(0).step(1, 2**32, 0, 0),
        lambda: segment.join(0).step(1, 0, -1, 0),
        lambda: segment.open(4),
        lambda: segment.open(-2),
        lambda: Bus(segment.addr, segment.nbytes - 1),
        lambda: Bus(segment.addr + 64, segment.nbytes - 64),
        lambda: make_routing([]),
        lambda: make_routing([64]),
    ):
        with pytest.raises(ValueError):
            work()


def test_only_one_thread_blocks_at_a_time(segment):
    hmm, rank = segment.open(), segment.join(0)
    hmm.set_membership(1, 0b11, True)
    results = at_once(*[lambda: rank.step(1, 0, 0, 100)] * 2)
    assert {type(result) for result in results} == {ValueError, BusTimeout}


def test_different_calls_are_noticed(segment):
    segment.open().set_membership(1, 0b11, True)
    first, second = segment.join(0), segment.join(1)
    results = at_once(lambda: dispatch_nothing(first, LONG_MS), lambda: second.step(1, 0, 0, LONG_MS))
    assert [type(result) for result in results] == [BusDesync, BusDesync]


def test_idle_ranks_wake_for_work(segment):
    segment.open().set_membership(1, 0b11, True)
    first, second = segment.join(0), segment.join(1)
    assert first.idle_wait(1, 1) is False
    woken, error = at_once(lambda: first.idle_wait(1, LONG_MS), lambda: second.step(1, 0, 0, 50))
    assert woken is True
    assert isinstance(error, BusTimeout)
    first.step(1, 0, 0, 0)
    second.step(1, 0, 0, 0)


def test_python_signals_are_handled_in_a_wait(segment):
    segment.open().set_membership(1, 0b11, True)
    rank, peer = segment.join(0), segment.join(1)
    main = threading.get_ident()

    def interrupt(_number, _frame):
        raise InterruptedError

    def send():
        peer.idle_wait(1, LONG_MS)  # until the rank waits
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(InterruptedError):
            rank.step(1, 0, 0, LONG_MS)
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)
    peer.step(1, 0, 0, LONG_MS)  # the interrupted arrival stands
    rank.step(1, 0, 0, 0)


def experts(ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return rows * (ids[:, None] + 1) + ids[:, None] % 3


def run_rank(segment: Segment, slot: int, owners: list[list[int]], seed: int) -> float:
    """Some layers of random tokens; the greatest difference from the direct computation."""
    _, max_tokens, hidden, top_k = SHAPE
    bus = segment.join(slot)
    random = np.random.default_rng([seed, slot])
    worst = 0.0
    for layer_owners in owners:
        routing = make_routing(layer_owners)
        n = int(random.integers(0, max_tokens + 1))
        x = random.standard_normal((n, hidden), dtype=np.float32)
        ids = random.integers(-1, NUM_EXPERTS, (n, top_k), dtype=np.int32)
        w = random.random((n, top_k), dtype=np.float32)
        rows = np.empty((SHAPE[0] * max_tokens * top_k, hidden), np.float32)
        counts = np.empty(NUM_EXPERTS, np.int32)
        inputs = (x.ctypes.data, ids.ctypes.data, w.ctypes.data, n)
        outputs = (rows.ctypes.data, len(rows), counts.ctypes.data)
        num_rows = bus.dispatch(routing, 1, *inputs, *outputs, LONG_MS)
        assert num_rows == counts.sum()
        assert all(owner == slot for owner, count in zip(layer_owners, counts, strict=True) if count)
        y = experts(np.repeat(np.arange(NUM_EXPERTS), counts), rows[:num_rows]).astype(np.float32)
        out = np.full((n, hidden), np.nan, np.float32)
        bus.combine(routing, 1, y.ctypes.data, out.ctypes.data, n, LONG_MS)
        direct = np.zeros((n, hidden))
        for j in range(top_k):
            direct += np.where(ids[:, j] < 0, 0, w[:, j])[:, None] * experts(ids[:, j], x)
        worst = max(worst, float(np.abs(out - direct).max(initial=0)))
    return worst


@pytest.mark.parametrize("members", [0b1, 0b1101, 0b1111])
def test_the_exchange_equals_the_direct_computation(segment, members):
    segment.open().set_membership(1, members, True)
    slots = [slot for slot in range(4) if members >> slot & 1]
    random = np.random.default_rng(members)
    owners = [[slots[i] for i in random.integers(0, len(slots), NUM_EXPERTS)] for _ in range(20)]
    results = at_once(*(lambda slot=slot: run_rank(segment, slot, owners, members) for slot in slots))
    assert all(isinstance(result, float) and result < 1e-4 for result in results), results


def test_the_result_does_not_depend_on_the_owners(segment):
    """Bit for bit, so that a scaling operation changes no token."""
    random = np.random.default_rng(1)
    _, n, hidden, top_k = SHAPE
    x = random.standard_normal((n, hidden), dtype=np.float32)
    ids = random.integers(0, NUM_EXPERTS, (n, top_k), dtype=np.int32)
    w = random.random((n, top_k), dtype=np.float32)

    def run(slot, generation, owners):
        bus, routing = segment.join(slot), make_routing(owners)
        own = n if slot == 0 else 0
        rows, counts = np.empty((n * top_k, hidden), np.float32), np.empty(NUM_EXPERTS, np.int32)
        out = np.empty((n, hidden), np.float32)
        pointers = (x.ctypes.data, ids.ctypes.data, w.ctypes.data)
        num_rows = bus.dispatch(
            routing, generation, *pointers, own, rows.ctypes.data, len(rows), counts.ctypes.data, LONG_MS
        )
        y = experts(np.repeat(np.arange(NUM_EXPERTS), counts), rows[:num_rows]).astype(np.float32)
        bus.combine(routing, generation, y.ctypes.data, out.ctypes.data, own, LONG_MS)
        return out.tobytes()

    results = set()
    for generation in range(1, 9):
        segment.open().set_membership(generation, 0b11, True)
        owners = random.integers(0, 2, NUM_EXPERTS).tolist()
        works = [lambda slot=slot, g=generation, o=owners: run(slot, g, o) for slot in (0, 1)]
        results.add(at_once(*works)[0])
    assert len(results) == 1


def test_wrong_exchanges_are_refused(segment):
    segment.open().set_membership(1, 0b1, True)
    bus = segment.join(0)
    routing = make_routing([0, 1, -1])
    x, w = np.ones((1, 32), np.float32), np.ones((1, 3), np.float32)
    rows, counts = np.empty((3, 32), np.float32), np.empty(3, np.int32)

    def dispatch(ids, n=1, cap=3, rows_addr=rows.ctypes.data):
        array = np.array([ids], np.int32)
        return bus.dispatch(
            routing, 1, x.ctypes.data, array.ctypes.data, w.ctypes.data, n, rows_addr, cap, counts.ctypes.data, 0
        )

    for arguments in [([0, 0, 3],), ([0, 0, -2],), ([0, 1, 0],), ([0, 2, 0],), ([0, 0, 0], 7), ([0, 0, 0], -1)]:
        with pytest.raises(ValueError):
            dispatch(*arguments)
    with pytest.raises(ValueError, match="misaligned"):
        dispatch([0, 0, 0], 1, 3, rows.ctypes.data + 1)
    with pytest.raises(ValueError, match="null"):
        dispatch([0, 0, 0], 1, 3, 0)
    with pytest.raises(ValueError, match="rows_cap"):
        dispatch([0, 0, 0], cap=2)
    with pytest.raises(ValueError, match="without a dispatch"):
        bus.combine(routing, 1, rows.ctypes.data, x.ctypes.data, 1, 0)
    assert dispatch([0, -1, 0]) == 2
    assert counts.tolist() == [2, 0, 0]
    assert routing.num_experts == 3
    assert routing.owners == [0, 1, -1]
