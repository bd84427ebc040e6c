"""Who sends how much to whom: a leg's copies by pairs of devices."""

from __future__ import annotations

from typing import Final

from elasticmoe.common.capacity import Sizes
from elasticmoe.services.scaler.api import views
from elasticmoe.services.scaler.planning.plan import Leg

PAIRS_TOLD: Final = 50  # of a leg: of hundreds of devices there are thousands


def moves_of(leg: Leg, sizes: Sizes) -> views.LegMoves:
    """The largest pairs of the leg, and what all have together."""
    pairs: dict[tuple[str | None, str], list[int]] = {}
    for copy in leg.copies:
        figures = pairs.setdefault((copy.source, copy.target), [0, 0, 0])
        figures[0] += 1
        figures[1] += copy.key.kind == "expert"
        figures[2] += sizes.of(copy.key)
    moves = [views.Move(*pair, *figures) for pair, figures in pairs.items()]
    moves.sort(key=lambda move: (-move.bytes, move.source or "", move.target))
    return views.LegMoves(moves[:PAIRS_TOLD], len(moves), len(leg.copies), sum(move.bytes for move in moves))
