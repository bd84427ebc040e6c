"""The supervisor's decisions (promise P18): bounded restarts with growing pauses, then fatal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cli.supervisor import ChildState, Exit, Fatal, Limits, Restart, decide, describe_exit

LIMITS = Limits(restarts_max=5, window_s=60.0, backoff_first_s=0.1, backoff_max_s=5.0)
RUNNING = Exit(1, starting=False)


def test_the_pauses_double_and_the_sixth_end_within_the_window_is_fatal() -> None:
    state, now, pauses = ChildState(), 100.0, []
    for number in range(1, 6):
        state, decision = decide(now, state, RUNNING, LIMITS)
        assert isinstance(decision, Restart)
        assert (decision.number, decision.limit) == (number, 5)
        pauses.append(decision.at - now)
        now = decision.at + 0.01
    assert [round(pause, 6) for pause in pauses] == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert state.num_restarts == 5
    state, decision = decide(now, state, RUNNING, LIMITS)
    assert isinstance(decision, Fatal)
    assert "5 times within 60 s" in decision.reason


def test_old_restarts_are_forgotten() -> None:
    state = ChildState()
    for hour in range(50):
        state, decision = decide(hour * 3_600.0, state, RUNNING, LIMITS)
        assert isinstance(decision, Restart)
        assert decision.number == 1
    assert len(state.restarts) == 1
    assert state.num_restarts == 50


def test_an_end_while_starting_is_fatal_at_once_whatever_its_code() -> None:
    for code in (0, 1, -9):
        state, decision = decide(5.0, ChildState(), Exit(code, starting=True), LIMITS)
        assert isinstance(decision, Fatal)
        assert state == ChildState()


def test_a_clean_exit_counts_too() -> None:
    _, decision = decide(5.0, ChildState(), Exit(0, starting=False), LIMITS)
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
