"""Leveling: within one, with the fewest sequences moved."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elasticmoe.services.scaler.planning.rebalance import SequenceMove, level, level_ahead


def test_examples() -> None:
    assert level({0: 5}) == ()
    assert level({0: 3, 1: 2}) == ()
    assert level({0: 4, 1: 0}) == (SequenceMove(0, 1, 2),)
    assert level({0: 5, 1: 5, 2: 0}) == (SequenceMove(0, 2, 1), SequenceMove(1, 2, 2))


def test_only_who_joins_gets_sequences_ahead() -> None:
    assert level_ahead({0: 6, 1: 5}, {2}) == (SequenceMove(0, 2, 1),)
    assert level_ahead({0: 9, 1: 1}, {2, 3}) == (SequenceMove(0, 2, 1), SequenceMove(0, 3, 1))
    assert level_ahead({0: 1, 1: 1}, {2}) == ()
    assert level_ahead({}, {2}) == ()


@given(st.dictionaries(st.integers(0, 63), st.integers(0, 500), min_size=1, max_size=16))
def test_all_are_level_within_one_and_nothing_moves_without_need(loads: dict[int, int]) -> None:
    after = dict(loads)
    moves = level(loads)
    for move in moves:
        assert move.num_sequences > 0
        after[move.source] -= move.num_sequences
        after[move.target] += move.num_sequences
    assert max(after.values()) - min(after.values()) <= 1
    assert sum(after.values()) == sum(loads.values())
    share, remainder = divmod(sum(loads.values()), len(loads))
    fewest = sum(max(0, load - share) for load in loads.values())
    over = sum(1 for load in loads.values() if load > share)
    assert sum(move.num_sequences for move in moves) == fewest - min(over, remainder)
    assert len(moves) < len(loads)
