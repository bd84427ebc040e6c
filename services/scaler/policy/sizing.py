"""How far up: the size that a growth leads to. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left

import msgspec

from elasticmoe.services.scaler.policy.demand import Demand
from elasticmoe.services.scaler.policy.figures import Unknown
from elasticmoe.services.scaler.policy.saturation import Saturation, predicted, reached, work_rate
from elasticmoe.services.scaler.policy.state import Evidence, PolicyState
from elasticmoe.services.scaler.policy.turn import Turn

GROWTH_MAX = 4  # times the present size
NO_BETTER = 0.95  # times what a narrower width comes to, and a wider one is not worth its devices


def target_of(turn: Turn, state: PolicyState, evidence: Evidence) -> int:
    """How far up: the smallest width that keeps up with the demand and what waits."""
    config, demand, signals = turn.config, turn.demand, turn.signals
    if isinstance(demand, Unknown) or turn.widths(turn.width).step is None:
        ratio = max(turn.raw.worst, state.saturation or 0.0) / (evidence.threshold or config.up_max)
        return min(max(turn.width + 1, math.ceil(turn.width * ratio)), 2 * turn.width, most_now(turn, state))
    rate = demand.requests_per_s
    if state.excess.is_too_much(config.up_after_s) and not isinstance(signals.burst_per_s, Unknown):
        rate = max(rate, signals.burst_per_s)
    waiting = max(0.0, signals.queued / config.ttft_s - rate / 2)  # those who are served in time wait, too
    return smallest(turn, state, demand.at(rate + waiting), config.headroom)


def most_now(turn: Turn, state: PolicyState) -> int:
    """Replicas that a growth may lead to now. What was refused for its size is not asked for again soon: half of it is,
    but one more at the least."""
    if state.refused is None or not state.refused.is_of_size or state.refused.target <= turn.width:
        return turn.most
    return min(turn.most, max(turn.width + 1, (turn.width + state.refused.target) // 2))


def smallest(turn: Turn, state: PolicyState, demand: Demand, headroom: float) -> int:
    """The smallest width above the present one that the demand fits in; where it fits in none that is allowed, see
    `_best`. What does for one width does for all wider ones."""
    demand = demand.times(headroom)

    def does(width: int) -> bool:
        return predicted(turn.widths(width), demand, turn.config).worst < 1.0 and has_room(turn, width)

    largest = min(GROWTH_MAX * turn.width, most_now(turn, state))
    width = bisect_left(range(largest), True, lo=min(turn.width + 1, largest), hi=largest, key=does)
    return width if width < largest or does(largest) else min(largest, _best(turn, demand))


def _best(turn: Turn, demand: Demand) -> int:
    """The smallest width that is as good as the largest one there may be: devices that do not help are not taken. The
    present one, where wider is known to be no better; one a quarter wider, where nobody has seen yet what a wider one
    does; one more, where what is measured is worse than the model says."""
    largest = turn.most
    limits = reached(turn.widths(largest), demand, turn.config)
    if limits is None:  # more work than all can do: the more of them, the more of it is done, but for shared cores
        now, most = (work_rate(turn.widths(width), demand) for width in (turn.width, largest))
        has_memory = has_room(turn, turn.width) and (turn.raw.kv or 0.0) < 1.0
        return turn.width if has_memory and now >= NO_BETTER * most else largest

    def is_as_good(width: int) -> bool:
        found = reached(turn.widths(width), demand, turn.config)
        is_roomy = has_room(turn, width) or not has_room(turn, largest)
        return is_roomy and found is not None and _is_no_better(limits, found)

    width = bisect_left(range(largest), True, lo=turn.width, hi=largest, key=is_as_good)
    if width > turn.width:
        return width
    if not _is_foreseen(turn, demand):
        return min(largest, turn.width + 1)
    may_help = _may_wider_help(turn, demand)
    return min(largest, turn.width + max(1, turn.width // 4)) if may_help else turn.width


def _may_wider_help(turn: Turn, demand: Demand) -> bool:
    """Whether steps may be shorter at a width that was not seen yet, as each of its devices reads fewer weights: unless
    those of the present width are no shorter than was predicted by the next narrower one that was seen."""
    here, wider = turn.widths(turn.width), turn.widths(turn.width + 1)
    if here.shares_cores or here.step_width != turn.width or wider.step_width is None or wider.step_width > turn.width:
        return False
    narrower = (turn.widths(width) for width in range(turn.width - 1, 0, -1))
    before = next((facts for facts in narrower if facts.step_width != turn.width), None)
    if before is None:
        return True
    foreseen = reached(msgspec.structs.replace(here, step=before.step), demand, turn.config)
    found = reached(here, demand, turn.config)
    return foreseen is None or found is None or not _is_no_better(found, foreseen)


def _is_foreseen(turn: Turn, demand: Demand) -> bool:
    """Whether all objectives that are broken are so by the model as well: what it does not know of may well become
    better with more replicas."""
    raw, found = turn.raw, reached(turn.widths(turn.width), demand, turn.config)
    first = max(raw.ttft or 0.0, raw.backlog or 0.0, raw.queue_age or 0.0)
    seen = (first, raw.itl or 0.0, raw.kv or 0.0)
    return found is not None and all(is_ < 1.0 or should >= 1.0 for is_, should in zip(seen, found, strict=True))


def _is_no_better(wide: tuple[float, ...], narrow: tuple[float, ...]) -> bool:
    """Whether the wider one keeps no objective that the narrower one breaks, nor comes nearer to it."""
    pairs = zip(narrow, wide, strict=True)
    return all(one < 1.0 or (other >= 1.0 and NO_BETTER * one <= other) for one, other in pairs)


def is_of_no_use(turn: Turn, narrow: int, wide: int) -> bool:
    """Whether a width is known to do no better for the present demand than a narrower one."""
    if isinstance(turn.demand, Unknown) or not _is_foreseen(turn, turn.demand):
        return False
    one, other = (reached(turn.widths(width), turn.demand, turn.config) for width in (narrow, wide))
    return one is not None and other is not None and _is_no_better(other, one)


def has_room(turn: Turn, width: int) -> bool:
    """Whether the KV that is used finds room at that width."""
    used = turn.signals.kv_used
    room = turn.widths(width).kv_tokens * width * turn.config.kv_share_max
    return isinstance(used, Unknown) or used <= room


def predicted_at(turn: Turn, width: int) -> Saturation | None:
    """Of a width, at the present demand."""
    return None if isinstance(turn.demand, Unknown) else predicted(turn.widths(width), turn.demand, turn.config)
