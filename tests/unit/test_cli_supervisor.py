"""The supervisor's decisions (promise P18): bounded restarts with growing pauses, then fatal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elasticmoe.cli.supervisor import ChildState, Exit, Fatal, Limits, Restart, decide, describe_exit
from elasticmoe.common.protocol.errors import EXIT_SUPERSEDED

LIMITS = Limits(restarts_max=5, window_s=60.0, backoff_first_s=0.1, backoff_max_s=5.0)
RUNNING = Exit(1, starting=False, is_vital=True)
SPARE = Exit(1, starting=False, is_vital=False)


def test_the_pauses_double_and_the_sixth_end_within_the_window_is_fatal() -> None:
    state, now, pauses = ChildState(), 100.0, []
    for number in range(1, 6):
        state, decision = decide(now, state, RUNNING, LIMITS)
        assert isinstance(decision, Restart)
        assert decision.why == f"restart {number} of 5"
        pauses.append(decision.at - now)
        now = decision.at + 0.01
    assert [round(pause, 6) for pause in pauses] == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert state.num_restarts == 5
    state, decision = decide(now, state, RUNNING, LIMITS)
    assert isinstance(decision, Fatal)
    assert "5 times within 60 s" in decision.reason


def test_a_child_that_is_not_vital_is_tried_for_ever_with_growing_pauses() -> None:
    state, now, pauses = ChildState(), 100.0, []
    for number in range(1, 200):
        state, decision = decide(now, state, SPARE, LIMITS)
        assert isinstance(decision, Restart)
        assert decision.is_failing == (number > 5)
        pauses.append(decision.at - now)
        now = decision.at + 0.5
        assert len(state.restarts) <= 60
    assert [round(pause, 6) for pause in pauses[:9]] == [0.1, 0.2, 0.4, 0.8, 1.6, 5.0, 10.0, 20.0, 30.0]
    assert {round(pause, 6) for pause in pauses[8:]} == {30.0}
    assert state.num_restarts == 199


def test_one_that_stays_up_for_a_window_is_forgiven() -> None:
    state, now = ChildState(), 100.0
    for _ in range(10):
        state, decision = decide(now, state, SPARE, LIMITS)
        assert isinstance(decision, Restart)
        now = decision.at + 0.5
    state, decision = decide(decision.at + LIMITS.window_s, state, SPARE, LIMITS)
    assert isinstance(decision, Restart)
    assert (decision.why, decision.is_failing, state.num_failing) == ("restart 1 of 5", False, 0)


@given(st.lists(st.sampled_from([1, EXIT_SUPERSEDED]), max_size=40), st.booleans())
def test_who_is_superseded_has_not_failed(codes: list[int], is_vital: bool) -> None:
    """As a scaler whose lease somebody else takes again and again: the restarts that count are those of failures."""
    state, now = ChildState(), 100.0
    for code in codes:
        before = state
        state, decision = decide(now, state, Exit(code, starting=False, is_vital=is_vital), LIMITS)
        if isinstance(decision, Fatal):
            assert codes.count(1) > LIMITS.restarts_max
            return
        if code == EXIT_SUPERSEDED:
            assert decision.at == now + LIMITS.superseded_s
            assert set(state.restarts) <= set(before.restarts)
        now = decision.at


def test_old_restarts_are_forgotten() -> None:
    state = ChildState()
    for hour in range(50):
        state, decision = decide(hour * 3_600.0, state, RUNNING, LIMITS)
        assert isinstance(decision, Restart)
        assert decision.why == "restart 1 of 5"
    assert len(state.restarts) == 1
    assert state.num_restarts == 50


def test_an_end_while_starting_is_fatal_at_once_whatever_its_code() -> None:
    for code in (0, 1, -9):
        state, decision = decide(5.0, ChildState(), Exit(code, starting=True, is_vital=False), LIMITS)
        assert isinstance(decision, Fatal)
        assert state == ChildState()


def test_a_clean_exit_counts_too() -> None:
    _, decision = decide(5.0, ChildState(), Exit(0, starting=False, is_vital=True), LIMITS)
    assert isinstance(decision, Restart)


@given(st.lists(st.floats(0.0, 200.0), max_size=60), st.integers(1, 6), st.floats(0.5, 30.0))
def test_no_window_ever_holds_more_restarts_than_the_limit(gaps: list[float], most: int, window_s: float) -> None:
    limits = Limits(restarts_max=most, window_s=window_s, backoff_first_s=0.1, backoff_max_s=1.0)
    state, now, restarts = ChildState(), 0.0, []
    for gap in gaps:
        now += gap
        state, decision = decide(now, state, RUNNING, limits)
        if isinstance(decision, Fatal):
            break
        assert now <= decision.at <= now + limits.backoff_max_s
        now = decision.at
        restarts.append(now)
        assert len(state.restarts) <= most
        assert sum(1 for at in restarts if now - at < window_s) <= most


def test_exits_have_names() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-9) == "signal SIGKILL"
    assert describe_exit(-200) == "signal 200"
