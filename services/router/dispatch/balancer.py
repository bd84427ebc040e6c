"""Which replica gets the next request. Pure: no clock, no sockets; the same input gives the same choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from elasticmoe.common.layout import RankId
from elasticmoe.common.wording import counted

STALE_S = 2.5  # silent, or with work and without progress, for longer: no new work while others are fresh
LOST_S = 10.0  # silent for longer: as good as dead
TOKENS_PER_REQUEST = 256  # queued prompt tokens that weigh as much as one running request
KV_PRESSURE_FROM = 0.8  # share of KV blocks in use beyond which a replica looks fuller than its requests say
KV_PRESSURE_REQUESTS = 64.0  # weight of the share beyond it


class Candidate(NamedTuple):
    """A replica's leader as the router sees it. `requests`: running and waiting. `silent_s`: since its last
    message; `stalled_s`: since it was last seen to make progress or to have nothing to do. `is_leaving`: it hands its
    requests over to others."""

    rank: RankId
    requests: int
    tokens_queued: int
    blocks_free: int
    blocks_total: int
    silent_s: float
    stalled_s: float
    is_leaving: bool = False

    @property
    def is_fresh(self) -> bool:
        """Known to make progress."""
        return self.silent_s <= STALE_S and self.stalled_s <= STALE_S

    @property
    def is_full(self) -> bool:
        """Has no KV block left."""
        return self.blocks_free <= 0

    @property
    def load(self) -> float:
        """In units of one running request."""
        used = 1.0 - self.blocks_free / self.blocks_total if self.blocks_total > 0 else 1.0
        pressure = max(0.0, used - KV_PRESSURE_FROM) * KV_PRESSURE_REQUESTS
        return self.requests + self.tokens_queued / TOKENS_PER_REQUEST + pressure


def decide(candidates: Sequence[Candidate], turn: int) -> tuple[RankId | None, str]:
    """Choose a replica: (rank, reason); (None, reason) when there is none.

    The least loaded of the fresh ones that stay; equal ones take turns by `turn`, a counter of requests. When there is
    none, a fresh one that leaves: it computes until another can take over. When all are stale, the least loaded that
    may still live is better than a refusal: a rank that comes back finds its requests waiting.
    """
    alive = sorted(candidate for candidate in candidates if candidate.silent_s <= LOST_S)
    if not alive:
        return None, f"no replica of {len(candidates)} has reported within {LOST_S:g} s"
    kind, among = _best(alive)
    least = min((candidate.is_full, candidate.load) for candidate in among)
    equal = [candidate for candidate in among if (candidate.is_full, candidate.load) == least]
    chosen = equal[turn % len(equal)]
    return chosen.rank, f"load {chosen.load:.2f} is the least of {counted(len(among), f'{kind} replica')}"


def _best(alive: Sequence[Candidate]) -> tuple[str, Sequence[Candidate]]:
    """The best kind of replica that there is, and all of that kind."""
    fresh = [candidate for candidate in alive if candidate.is_fresh]
    kinds = {
        "fresh": [candidate for candidate in fresh if not candidate.is_leaving],
        "leaving": fresh,
        "stale": [candidate for candidate in alive if not candidate.is_leaving],
    }
    return next(((kind, among) for kind, among in kinds.items() if among), ("stale and leaving", alive))
