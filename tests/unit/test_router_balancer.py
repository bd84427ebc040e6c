"""Which replica gets a request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elasticmoe.common.layout import RankId
from elasticmoe.services.router.dispatch.balancer import LOST_S, STALE_S, Candidate, decide


def candidate(
    replica: int,
    requests: int = 0,
    queued: int = 0,
    free: int = 100,
    silent_s: float = 0.0,
    stalled_s: float = 0.0,
    is_leaving: bool = False,
) -> Candidate:
    return Candidate(RankId(replica, 0), requests, queued, free, 100, silent_s, stalled_s, is_leaving)


def chosen(*candidates: Candidate, turn: int = 0) -> int | None:
    rank, reason = decide(candidates, turn)
    assert reason
    return rank.replica if rank else None


def test_the_least_loaded() -> None:
    assert chosen(candidate(0, 3), candidate(1, 2), candidate(2, 4)) == 1
    assert chosen(candidate(0, 1, queued=10_000), candidate(1, 2)) == 1


def test_equal_ones_take_turns() -> None:
    equal = [candidate(2), candidate(0), candidate(1)]
    assert [chosen(*equal, turn=turn) for turn in range(4)] == [0, 1, 2, 0]


def test_a_full_replica_waits_for_its_turn() -> None:
    assert chosen(candidate(0, 1, free=0), candidate(1, 50)) == 1
    assert chosen(candidate(0, 1, free=1), candidate(1, 2)) == 1  # nearly full counts as load
    assert chosen(candidate(0, 1, free=0)) == 0


def test_stale_replicas_get_nothing_while_others_are_fresh() -> None:
    assert chosen(candidate(0, silent_s=STALE_S + 0.1), candidate(1, 100)) == 1
    assert chosen(candidate(0, stalled_s=STALE_S + 0.1), candidate(1, 100)) == 1
    assert chosen(candidate(0, silent_s=STALE_S + 0.1)) == 0
    assert chosen(candidate(0, silent_s=LOST_S + 0.1)) is None
    assert chosen() is None


def test_leaving_replicas_get_nothing_while_another_can_take_it() -> None:
    leaving = candidate(0, is_leaving=True)
    assert chosen(leaving, candidate(1, 100, free=0)) == 1
    assert chosen(leaving, candidate(1, stalled_s=STALE_S + 0.1)) == 0  # it computes until another can
    assert chosen(leaving, candidate(1, 5, is_leaving=True)) == 0
    stale = candidate(0, silent_s=STALE_S + 0.1, is_leaving=True)
    assert chosen(stale, candidate(1, 100, silent_s=STALE_S + 0.1)) == 1
    assert chosen(stale) == 0


@given(
    st.lists(
        st.builds(
            candidate,
            st.integers(0, 63),
            st.integers(-5, 1 << 40),
            st.integers(-5, 1 << 40),
            st.integers(-5, 200),
            st.floats(0, 100),
            st.floats(0, 100),
            st.booleans(),
        ),
        max_size=8,
    ),
    st.integers(0, 1 << 40),
)
def test_any_input_has_an_answer(candidates: list[Candidate], turn: int) -> None:
    rank, _ = decide(candidates, turn)
    alive = {c.rank for c in candidates if c.silent_s <= LOST_S}
    assert (rank in alive) if alive else rank is None
    if any(c.is_fresh and not c.is_leaving for c in candidates):
        assert any(c.rank == rank and c.is_fresh and not c.is_leaving for c in candidates)
