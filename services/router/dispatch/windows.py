"""What a router tells the scaler of its load: a window about once a second, pushed, and lost where the scaler is away.

Latencies are as the router's metrics have them, in the buckets that all routers share, so that windows can be added.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from elasticmoe.common.endpoints import PushEnd
from elasticmoe.common.protocol.limits import WINDOW_SECONDS_MAX
from elasticmoe.common.protocol.signals import RouterWindow
from elasticmoe.common.sketch import JointSketch, Sketch
from elasticmoe.services.router.dispatch.streams import Stream

SPAN_S = 1.0
IDLE_SPAN_S = 2.0  # of a window in which nothing happened: it says that the router lives


class RouterWindows:
    """For one asyncio loop. The dispatcher says what happens; `turn` pushes what has come together. `connect` makes the
    end for that, at the first turn."""

    def __init__(self, identity: str, connect: Callable[[], PushEnd]) -> None:
        self._identity = identity
        self._connect = connect
        self._end: PushEnd | None = None
        self._number = 0
        self._began_at: float | None = None
        self._epoch = 0
        self._ttft, self._gaps, self._joint = Sketch(), Sketch(), JointSketch()
        self._clear()

    def _clear(self) -> None:
        self._admitted = self._refused = self._prompt_tokens = self._max_tokens = 0
        self._output_tokens = self._num_finished = self._num_failed = self._num_cancelled = 0

    def admitted(self, stream: Stream) -> None:
        """A generation was accepted."""
        self._admitted += 1
        self._prompt_tokens += len(stream.submit.prompt)
        self._max_tokens += stream.submit.max_tokens

    def refused(self, num: int = 1) -> None:
        """So many were refused for want of room: they are demand that no rank has seen."""
        self._refused += num

    def tokens(self, seconds: float, is_first: bool) -> None:
        """Tokens came, so long after the ones before them or after acceptance."""
        (self._ttft if is_first else self._gaps).add(seconds)

    def ended(self, stream: Stream) -> None:
        """A generation has ended. How its client was served counts where it finished."""
        assert stream.ending is not None
        if stream.ending.kind == "error":
            self._num_failed += 1
            return
        if stream.ending.kind != "finish":
            self._num_cancelled += 1
            return
        self._num_finished += 1
        self._output_tokens += stream.num_tokens
        if stream.first_at is not None:
            gap_s = (stream.last_at - stream.first_at) / max(1, stream.num_tokens - 1)
            self._joint.add(stream.first_at - stream.accepted_at, gap_s)

    def turn(self, now: float, epoch: int, streams: Collection[Stream]) -> None:
        """Push the window that has ended, if one has. `streams`: all that are open. `epoch`: of the layout by which
        the router sends: a new one ends the window, which would be of two layouts otherwise."""
        if self._began_at is None or self._end is None:
            self._end = self._connect()
            self._began_at, self._epoch = now, epoch
            return
        span_s = now - self._began_at
        num_ended = self._num_finished + self._num_failed + self._num_cancelled
        is_idle = not (streams or self._admitted or self._refused or num_ended)
        if span_s <= 0 or (span_s < (IDLE_SPAN_S if is_idle else SPAN_S) and epoch == self._epoch):
            return
        self._number += 1
        queued = [stream for stream in streams if stream.first_at is None]
        oldest = min(queued, key=lambda stream: stream.accepted_at, default=None)
        self._end.push(
            RouterWindow(
                router=self._identity,
                number=self._number,
                epoch=self._epoch,
                ended_s=now,
                span_s=min(span_s, WINDOW_SECONDS_MAX),
                admitted=self._admitted,
                refused=self._refused,
                prompt_tokens=self._prompt_tokens,
                max_tokens=self._max_tokens,
                output_tokens=self._output_tokens,
                finished=self._num_finished,
                failed=self._num_failed,
                cancelled=self._num_cancelled,
                open=len(streams),
                queued=len(queued),
                oldest_queued_s=max(0.0, now - oldest.accepted_at) if oldest else 0.0,
                oldest_prompt_tokens=len(oldest.submit.prompt) if oldest else 0,
                ttft=self._ttft.take(),
                gaps=self._gaps.take(),
                joint=self._joint.take(),
            )
        )
        self._began_at, self._epoch = now, epoch
        self._clear()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        if self._end is not None:
            self._end.close()
