"""What happens to one stream of a traced request: noted while it runs, written as spans when it has ended.

The router knows a request's whole life: it sees whoever has the stream, and ranks tell it what only they know. So no
rank has an exporter, and no step waits for one. Times are of the router's monotonic clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.router import RankTimes

if TYPE_CHECKING:
    from elasticmoe.common.tracing.spans import Attributes, OpenSpan, Spans
    from elasticmoe.services.router.dispatch.streams import Stream

PARTS_MAX: Final = 64  # of one stream; it has more where it moves all the time


class _Part(NamedTuple):
    name: str
    began: float
    ended: float
    facts: Attributes


class Trail:
    """Of one stream, for the dispatcher's loop. `within`: its request's span; `to_unix`: what to add to times for those
    of the world's clock; `choice`: its number among the request's choices."""

    def __init__(self, spans: Spans, within: OpenSpan, to_unix: float, choice: int) -> None:
        self._spans = spans
        self._within = within
        self._to_unix = to_unix
        self._choice = choice
        self._parts: list[_Part] = []
        self._num_left_out = 0
        self._pause: tuple[str, float, Attributes] | None = None
        self._speaker: tuple[RankId | None, str] | None = None
        self._num_moves = self._num_recoveries = 0
        self._computing: tuple[float, Attributes] | None = None  # since when, until the next token

    def timed(self, times: RankTimes, rank: RankId, now: float) -> None:
        """The rank has told what came before the tokens that follow."""
        computed_at = now - times.computed_s
        where: Attributes = {"elasticmoe.rank": str(rank)}
        if not times.num_stops:
            self._add(_Part("queue", computed_at - times.waited_s, computed_at, where))
        facts = {"elasticmoe.cached_tokens": times.num_cached, "elasticmoe.preemptions": times.num_stops}
        self._computing = computed_at, {**where, **facts}

    def moved(self, stream: Stream, to: RankId, now: float) -> None:
        """Another rank goes on with it; its tokens pause until that one's first."""
        self._num_moves += 1
        self._begin("move", stream, now, {"elasticmoe.from": str(stream.rank), "elasticmoe.to": str(to)})

    def heard(self, stream: Stream, now: float) -> None:
        """Its rank has said something of it. Where that is another process than the one that did before, in the same
        seat, that one goes on with it, from the ledger."""
        before, self._speaker = self._speaker, (stream.rank, stream.sender)
        if before is not None and before[0] == stream.rank and before[1] != stream.sender:
            self._num_recoveries += 1
            self._begin("recovery", stream, now, {"elasticmoe.how": "adopted", "elasticmoe.rank": str(stream.rank)})

    def resubmitted(self, stream: Stream, to: RankId, why: str, now: float) -> None:
        """It was submitted anew, to `to`, because of the error `why`."""
        self._num_recoveries += 1
        self._speaker = None
        facts = {"elasticmoe.how": "resubmitted", "elasticmoe.to": str(to), "error.type": why}
        self._begin("recovery", stream, now, facts)

    def _begin(self, name: str, stream: Stream, now: float, facts: Attributes) -> None:
        """A pause, as the client sees it: since the last token, where there was one."""
        self.went_on(now)
        self._pause = name, stream.last_at if stream.num_tokens else now, facts

    def went_on(self, now: float) -> None:
        """New tokens have come."""
        if self._computing is not None:
            began, facts = self._computing
            self._computing = None
            self._add(_Part("prefill", began, now, facts))
        if self._pause is not None:
            name, began, facts = self._pause
            self._pause = None
            self._add(_Part(name, began, now, facts))

    def _add(self, part: _Part) -> None:
        if len(self._parts) < PARTS_MAX:
            self._parts.append(part)
        else:
            self._num_left_out += 1

    def write(self, stream: Stream, now: float) -> None:
        """It has ended."""
        self.went_on(now)
        first_at = stream.first_at
        events = [] if first_at is None else [("first_token", first_at + self._to_unix)]
        ending = stream.ending
        error = ending.reason if ending is not None and ending.kind != "finish" else ""
        span = self._spans.write(
            self._within,
            "generate",
            stream.accepted_at + self._to_unix,
            now + self._to_unix,
            self._facts(stream),
            error=error,
            events=events,
        )
        if first_at is not None:
            self._add(_Part("decode", first_at, now, {"gen_ai.usage.output_tokens": stream.num_tokens}))
        for part in self._parts:
            self._spans.write(span, part.name, part.began + self._to_unix, part.ended + self._to_unix, part.facts)

    def _facts(self, stream: Stream) -> Attributes:
        facts: dict[str, str | int | float | tuple[str, ...]] = {
            "elasticmoe.stream": stream.name,
            "elasticmoe.choice": self._choice,
            "elasticmoe.rank": str(stream.rank) if stream.rank is not None else "",
            "elasticmoe.moves": self._num_moves,
            "elasticmoe.recoveries": self._num_recoveries,
            "gen_ai.request.max_tokens": stream.submit.max_tokens,
            "gen_ai.request.temperature": stream.submit.sampling.temperature,
            "gen_ai.request.top_p": stream.submit.sampling.top_p,
            "gen_ai.usage.input_tokens": len(stream.submit.prompt),
            "gen_ai.usage.output_tokens": stream.num_tokens,
        }
        if stream.first_at is not None:
            facts["gen_ai.latency.time_to_first_token"] = stream.first_at - stream.accepted_at
        if stream.ending is not None:
            what = "gen_ai.response.finish_reasons" if stream.ending.kind == "finish" else "error.type"
            facts[what] = (stream.ending.reason,) if stream.ending.kind == "finish" else stream.ending.reason
        if self._num_left_out:
            facts["elasticmoe.parts_left_out"] = self._num_left_out
        return facts
