"""What a rank tells the scaler of its load: a window about once a second, pushed, and lost where the scaler is away.
A follower tells now and then of its experts, which are its own, and leaves all else to its leader.

Costs a step next to nothing: two additions, and for a few steps of each window the sums over their sequences.
"""

from __future__ import annotations

from collections.abc import Callable

from elasticmoe.common.endpoints import PushEnd
from elasticmoe.common.protocol.limits import STEP_SAMPLES_MAX, WINDOW_SECONDS_MAX
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.signals import RankWindow, StepSample
from elasticmoe.services.worker.engine.plan import StepPlan
from elasticmoe.services.worker.engine.scheduler import Scheduler
from elasticmoe.services.worker.exchange.expert_rows import ExpertRows

SPAN_S = 1.0  # of a window in which something happened
IDLE_SPAN_S = 2.0  # of others: they say that the rank lives and has nothing to do
EXPERTS_EVERY_S = 5.0  # a window tells how often experts were routed to, too


class RankWindows:
    """Owned by the rank's thread. `scheduler` is read when a window ends; `take_expert_rows`: the exchange's."""

    def __init__(
        self, seat: StartRank, scheduler: Scheduler, end: PushEnd, take_expert_rows: Callable[[], ExpertRows]
    ) -> None:
        self._seat = seat
        self._scheduler = scheduler
        self._end = end
        self._take_expert_rows = take_expert_rows
        self._experts_at = 0.0  # when they were told last
        self._number = 0
        self._began_at: float | None = None
        self._epoch = 0
        self._since_cutover = 0
        self._num_steps = 0
        self._num_tokens = 0  # chosen
        self._uncached = self._cached = 0  # of the scheduler's counts, what earlier windows have told
        self._samples: list[StepSample] = []
        self._stride = 1  # each so manieth step is a sample: doubled whenever there are too many

    def step(self, plan: StepPlan, seconds: float) -> None:
        """A step is over, which has taken so long, waiting for other ranks included."""
        self._num_tokens += sum(chunk.sample for chunk in plan.chunks)
        if plan.chunks and self._num_steps % self._stride == 0:
            if len(self._samples) == STEP_SAMPLES_MAX:
                del self._samples[1::2]
                self._stride *= 2
            if self._num_steps % self._stride == 0:
                self._samples.append(self._sample(plan, seconds))
        self._num_steps += 1
        self._since_cutover += 1

    def _sample(self, plan: StepPlan, seconds: float) -> StepSample:
        prefills = [chunk.num_tokens for chunk in plan.chunks if chunk.start < chunk.sequence.num_prompt]
        return StepSample(
            seconds=seconds,
            prefill_tokens=sum(prefills),
            kv_tokens=sum(chunk.start + chunk.num_tokens for chunk in plan.chunks),
            sequences=len(plan.chunks) - len(prefills),
            steps_since_cutover=self._since_cutover,
        )

    def turn(self, now: float, epoch: int) -> None:
        """Push the window that has ended, if one has. `epoch`: of the layout by which the rank steps: a new one ends
        the window, which would be of two layouts otherwise."""
        if self._began_at is None:
            self._began_at, self._epoch = now, epoch
            return
        span_s = now - self._began_at
        is_new = epoch != self._epoch
        if span_s <= 0 or not (is_new or span_s >= (SPAN_S if self._is_used else IDLE_SPAN_S)):
            return
        self._end.push(self._window(now, span_s))
        self._began_at, self._num_steps, self._num_tokens = now, 0, 0
        self._samples, self._stride = [], 1
        self._uncached, self._cached = self._scheduler.tokens_uncached, self._scheduler.tokens_cached
        if is_new:
            self._epoch, self._since_cutover = epoch, 0

    @property
    def _is_used(self) -> bool:
        return bool(self._num_steps or self._scheduler.running or self._scheduler.waiting)

    def _window(self, now: float, span_s: float) -> RankWindow:
        self._number += 1
        scheduler = self._scheduler
        blocks = scheduler.blocks
        experts = ExpertRows(0, ())
        if now - self._experts_at >= EXPERTS_EVERY_S:
            self._experts_at, experts = now, self._take_expert_rows()
        return RankWindow(
            rank=self._seat.rank,
            incarnation=self._seat.incarnation,
            number=self._number,
            epoch=self._epoch,
            ended_s=now,
            span_s=min(span_s, WINDOW_SECONDS_MAX),
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            queued_prefill_tokens=scheduler.tokens_queued,
            kv_used=(blocks.num_blocks - blocks.num_free) * blocks.block_size,
            kv_total=blocks.num_blocks * blocks.block_size,
            uncached_tokens=scheduler.tokens_uncached - self._uncached,
            cached_tokens=scheduler.tokens_cached - self._cached,
            generated=self._num_tokens,
            num_steps=self._num_steps,
            steps=tuple(self._samples),
            expert_steps=experts.num_steps,
            expert_rows=experts.rows,
        )

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._end.close()


class FollowerWindows:
    """Owned by the follower's thread. `take_expert_rows`: the exchange's."""

    def __init__(self, seat: StartRank, end: PushEnd, take_expert_rows: Callable[[], ExpertRows], now: float) -> None:
        self._seat = seat
        self._end = end
        self._take_expert_rows = take_expert_rows
        self._told_at = now
        self._number = 0

    def turn(self, now: float, epoch: int) -> None:
        """Push how often experts were routed to since the last time, if it is due and there were steps. `epoch`: of the
        layout by which the rank steps."""
        span_s = now - self._told_at
        if span_s < EXPERTS_EVERY_S:
            return
        self._told_at, experts = now, self._take_expert_rows()
        if not experts.num_steps:
            return
        self._number += 1
        self._end.push(
            RankWindow(
                rank=self._seat.rank,
                incarnation=self._seat.incarnation,
                number=self._number,
                epoch=epoch,
                ended_s=now,
                span_s=min(span_s, WINDOW_SECONDS_MAX),
                expert_steps=experts.num_steps,
                expert_rows=experts.rows,
            )
        )

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._end.close()
