"""What a rank tells of its load, from a real scheduler that is stepped by hand."""

from __future__ import annotations

import itertools

import pytest

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.limits import STEP_SAMPLES_MAX, WINDOW_SECONDS_MAX
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.common.protocol.signals import RankWindow
from elasticmoe.services.worker.engine.blocks import BlockManager
from elasticmoe.services.worker.engine.scheduler import Scheduler
from elasticmoe.services.worker.exchange.expert_rows import ExpertRows
from elasticmoe.services.worker.rank.windows import IDLE_SPAN_S, SPAN_S, RankWindows
from tests.unit.windows import Pushed

SEAT = StartRank(RankId(1, 0), 1, "host:1", "rank-r1t0:1", 1, 64, 8, 256)
PROMPT = tuple(range(20))


class Bench:
    def __init__(self, num_blocks: int = 64) -> None:
        self.scheduler = Scheduler(
            BlockManager(num_blocks, 4), max_tokens=64, max_sequences=8, max_model_len=128, max_waiting=8
        )
        self.pushed = Pushed()
        self.expert_rows = ExpertRows(0, ())
        self.windows = RankWindows(SEAT, self.scheduler, self.pushed, lambda: self.expert_rows)
        self.now = 50.0
        self.epoch = 3
        self.windows.turn(self.now, self.epoch)

    def add(self, name: str, prompt: tuple[int, ...] = PROMPT, max_tokens: int = 50) -> None:
        self.scheduler.add(Submit(name, prompt, max_tokens, Sampling(seed=1)), b"router", self.now)

    def step(self, seconds: float = 0.01) -> None:
        plan = self.scheduler.plan()
        self.scheduler.commit(plan.chunks, [7] * sum(chunk.sample for chunk in plan.chunks))
        self.windows.step(plan, seconds)
        self.now += seconds
        self.windows.turn(self.now, self.epoch)

    def pass_time(self, seconds: float) -> RankWindow | None:
        """The window that this brings."""
        before = len(self.pushed.windows)
        self.now += seconds
        self.windows.turn(self.now, self.epoch)
        found = self.pushed.windows[before:]
        assert len(found) <= 1
        assert not found or isinstance(found[0], RankWindow)
        return found[0] if found else None  # type: ignore[return-value]


def test_a_window_tells_what_was_done_in_it_and_how_things_stand() -> None:
    bench = Bench()
    bench.add("a")
    bench.step()
    bench.add("b")
    bench.step()
    bench.add("c", tuple(range(100, 110)))
    window = bench.pass_time(SPAN_S)
    assert window is not None
    assert (window.rank, window.incarnation, window.epoch, window.number) == (RankId(1, 0), "rank-r1t0:1", 3, 1)
    assert (window.ended_s, window.span_s) == (bench.now, pytest.approx(bench.now - 50.0))
    assert (window.running, window.waiting, window.queued_prefill_tokens) == (2, 1, 10)
    assert (window.uncached_tokens, window.cached_tokens) == (20 + 4, 16), "b finds four of its five blocks"
    assert (window.generated, window.num_steps) == (3, 2)
    assert window.kv_total == 64 * 4
    assert window.kv_used == 4 * (64 - bench.scheduler.blocks.num_free)
    first, second = window.steps
    assert (first.prefill_tokens, first.sequences, first.kv_tokens, first.steps_since_cutover) == (20, 0, 20, 0)
    assert (second.prefill_tokens, second.sequences, second.kv_tokens, second.seconds) == (4, 1, 21 + 20, 0.01)


def test_the_next_window_has_nothing_of_the_one_before() -> None:
    bench = Bench()
    bench.add("a")
    bench.step()
    assert bench.pass_time(SPAN_S) is not None
    bench.step()
    window = bench.pass_time(SPAN_S)
    assert window is not None
    assert (window.number, window.uncached_tokens, window.generated, window.num_steps) == (2, 0, 1, 1)
    assert [sample.steps_since_cutover for sample in window.steps] == [1]


def test_a_rank_without_work_says_that_it_lives_and_less_often() -> None:
    bench = Bench()
    assert bench.pass_time(SPAN_S) is None
    window = bench.pass_time(IDLE_SPAN_S - SPAN_S)
    assert window is not None
    assert (window.num_steps, window.running, window.waiting, window.steps) == (0, 0, 0, ())


def test_another_layout_ends_the_window_and_counts_its_steps_anew() -> None:
    bench = Bench()
    bench.add("a")
    bench.step()
    bench.step()
    bench.epoch = 4
    window = bench.pass_time(0.01)
    assert window is not None
    assert (window.epoch, window.num_steps) == (3, 2), "it tells of the layout that is over"
    bench.step()
    after = bench.pass_time(SPAN_S)
    assert after is not None
    assert (after.epoch, [sample.steps_since_cutover for sample in after.steps]) == (4, [0])


@pytest.mark.parametrize("num_steps", [1, STEP_SAMPLES_MAX, STEP_SAMPLES_MAX + 1, 100])
def test_of_many_steps_some_are_told_evenly(num_steps: int) -> None:
    bench = Bench()
    bench.add("a", max_tokens=200)
    for _ in range(num_steps):
        bench.step(0.001)
    window = bench.pass_time(SPAN_S)
    assert window is not None
    assert window.num_steps == num_steps
    assert min(num_steps, STEP_SAMPLES_MAX // 2) <= len(window.steps) <= STEP_SAMPLES_MAX
    numbers = [sample.steps_since_cutover for sample in window.steps]
    distances = {later - earlier for earlier, later in itertools.pairwise(numbers)}
    assert len(distances) <= 1
    assert numbers[0] == 0
    assert numbers[-1] >= num_steps // 2


def test_steps_in_which_it_had_nothing_to_compute_are_no_samples() -> None:
    bench = Bench()
    bench.step()
    window = bench.pass_time(SPAN_S)
    assert window is not None
    assert (window.num_steps, window.steps) == (1, ())


def test_who_lost_its_blocks_and_runs_again_is_no_new_demand() -> None:
    bench = Bench(num_blocks=12)
    bench.add("a", max_tokens=40)
    bench.add("b", tuple(range(50, 70)), max_tokens=40)
    for _ in range(30):
        bench.step()
    assert bench.scheduler.recomputed or any(s.stops for s in bench.scheduler.sequences()), "one had to give way"
    assert bench.scheduler.tokens_uncached + bench.scheduler.tokens_cached == 40


def test_a_rank_that_was_stopped_for_days_tells_no_more_than_may_be_told() -> None:
    window = Bench().pass_time(10 * WINDOW_SECONDS_MAX)
    assert window is not None
    assert window.span_s == WINDOW_SECONDS_MAX
