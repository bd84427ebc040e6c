"""What a rank tells of a traced request's time, from a real scheduler that is stepped by hand."""

from __future__ import annotations

from elasticmoe.common.protocol.rank import Origin, Sampling, Submit
from elasticmoe.common.protocol.router import Delta, Failed, RankTimes
from elasticmoe.services.worker.engine.blocks import BlockManager
from elasticmoe.services.worker.engine.outcome import Outcome
from elasticmoe.services.worker.engine.scheduler import Scheduler
from elasticmoe.services.worker.rank.request_times import NOTED_MAX, RequestTimes
from tests.clocks import PlayedClock

ROUTER = b"router"
PARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"
PROMPT = tuple(range(20))


def submit(name: str, *, is_traced: bool = True) -> Submit:
    origin = Origin(name, PARENT if is_traced else "")
    return Submit(name, PROMPT, 50, Sampling(seed=1), origin=origin)


class Bench:
    """A rank's loop as far as times go; of its blocks there are few."""

    def __init__(self, num_blocks: int) -> None:
        self.scheduler = Scheduler(
            BlockManager(num_blocks, 4), max_tokens=8, max_sequences=4, max_model_len=64, max_waiting=8
        )
        self.now = 10.0
        self.times = RequestTimes(PlayedClock(lambda: self.now))

    def add(self, request: Submit) -> None:
        self.scheduler.add(request, ROUTER, self.now)
        self.times.arrived(request, ROUTER, self.now)

    def step(self) -> list[RankTimes]:
        """A step of a second; what is told of it."""
        plan = self.scheduler.plan()
        self.times.admitted(plan.admitted, self.now)
        self.now += 1.0
        sampled = [chunk.sequence for chunk in plan.chunks if chunk.sample]
        self.scheduler.commit(plan.chunks, [7] * len(sampled))
        deltas = [Delta(s.request.request_id, s.num_output - 1, (7,)) for s in sampled]
        return [times for _, times in self.times.tell(Outcome({ROUTER: deltas}, []))]


def test_a_request_waits_and_is_computed() -> None:
    bench = Bench(num_blocks=16)
    bench.add(submit("a"))
    bench.now += 0.5
    told = [bench.step() for _ in range(5)]
    assert told == [[], [], [RankTimes("a", 0.5, 3.0, 0, 0)], [], []]
    assert not bench.times.has_begun
    bench.add(submit("b"))  # the same prompt: but for its last block it is there
    assert bench.step() == [RankTimes("b", 0.0, 1.0, 16, 0)]


def test_nothing_is_noted_of_others() -> None:
    bench = Bench(num_blocks=16)
    bench.add(submit("a", is_traced=False))
    bench.add(Submit("b", PROMPT, 50, Sampling(seed=1)))
    bench.step()
    assert not bench.times.has_begun


def test_one_that_lost_its_blocks_is_told_again() -> None:
    bench = Bench(num_blocks=13)
    bench.add(submit("a"))
    bench.add(submit("b"))
    told = [times for _ in range(60) for times in bench.step()]
    again = [times for times in told if times.num_stops]
    assert {times.request_id for times in told if not times.num_stops} == {"a", "b"}
    assert again
    assert all(times.waited_s == 0.0 for times in again)


def test_what_ended_is_forgotten_and_what_is_noted_has_a_bound() -> None:
    bench = Bench(num_blocks=16)
    bench.add(submit("a"))
    bench.step()
    bench.times.forget(ROUTER, "a")
    assert not bench.times.has_begun
    bench = Bench(num_blocks=16)
    bench.add(submit("a"))
    bench.step()
    bench.times.tell(Outcome({}, [(ROUTER, Failed("a", "code", "text", False))]))
    assert not bench.times.has_begun
    bench = Bench(num_blocks=16)
    for number in range(NOTED_MAX + 1):
        bench.times.arrived(submit(str(number)), ROUTER, bench.now)
    bench.add(submit("last"))
    assert [times for _ in range(3) for times in bench.step()] == [RankTimes("last", 0.0, 3.0, 0, 0)]
