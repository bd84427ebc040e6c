"""What a tour has measured, and how it is told: each act's figures and its sentences. Pure."""

from __future__ import annotations

import msgspec


class QuietRun(msgspec.Struct, frozen=True, kw_only=True):
    """One replica at rest. `alone_ms`, `together_ms`: mean time between the tokens of one stream alone, and of
    `streams` that began together, whose texts later ones are compared with. `objective_ms`: what the policy shall keep.
    """

    streams: int
    together_ms: float
    alone_ms: float
    objective_ms: float

    def told(self) -> str:
        """In a sentence."""
        return (
            f"Each of {self.streams} streams at once had a token every {_ms(self.together_ms)}; one alone has a token "
            f"every {_ms(self.alone_ms)}. The policy may act now, and is to keep {_ms(self.objective_ms)}."
        )


class SizeChange(msgspec.Struct, frozen=True, kw_only=True):
    """One operation that the policy ordered. `ordered_s`: from the change of the load to the order; `took_s`: from the
    order until the new replica could serve, or the old one had left. `gap_ms`: the longest pause of a stream meanwhile;
    `recomputed`: tokens that were computed again; `moved`: streams that moved with their KV."""

    replicas_before: int
    replicas_after: int
    reason: str
    ordered_s: float
    took_s: float
    gap_ms: float
    recomputed: int
    moved: int

    def told(self) -> str:
        """In a sentence."""
        did = "could serve" if self.replicas_after > self.replicas_before else "had left"
        return (
            f"{self.ordered_s:.1f} s later the policy ordered {_count(self.replicas_after, 'replica')}: {self.reason}. "
            f"The replica {did} {self.took_s:.2f} s after the order. The longest gap of a stream was "
            f"{_ms(self.gap_ms)}; {_count(self.moved, 'stream')} moved with KV, "
            f"{_count(self.recomputed, 'token')} were recomputed."
        )


class RankKill(msgspec.Struct, frozen=True, kw_only=True):
    """`kill -9` of a rank. `back_s`: until a standby served in its seat; `resubmitted`: streams that the router had to
    start anew. The other figures are those of SizeChange."""

    rank: str
    back_s: float
    gap_ms: float
    recomputed: int
    resubmitted: int

    def told(self) -> str:
        """In a sentence."""
        return (
            f"A standby served in the seat of {self.rank} {self.back_s:.2f} s later. The longest gap of a stream was "
            f"{_ms(self.gap_ms)}; {_count(self.recomputed, 'token')} were recomputed, "
            f"{_count(self.resubmitted, 'stream')} had to be started anew."
        )


class StreamCount(msgspec.Struct, frozen=True, kw_only=True):
    """All streams of the tour. `lost`: by an error's code, how many ended with it; `wrong`: whose text differs from the
    one at rest."""

    whole: int
    tokens: int
    lost: dict[str, int]
    wrong: int

    def told(self) -> str:
        """In a sentence."""
        lost = sum(self.lost.values())
        codes = f" ({', '.join(sorted(self.lost))})" if lost else ""
        return (
            f"{_count(self.whole + lost, 'stream')}, {_count(self.tokens, 'token')}: {lost} lost{codes}, {self.wrong} "
            "with a text that differs from the one at rest."
        )


class TourFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The whole tour. `up_s`: from the command to the first answer that could be given; `elapsed_s`: all of it."""

    model: str
    up_s: float
    quiet: QuietRun
    growth: SizeChange
    kill: RankKill
    shrink: SizeChange
    streams: StreamCount
    elapsed_s: float


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.1f} ms"
