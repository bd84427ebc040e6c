"""Places: never more than there are, idle ones leave first, and every connection is somewhere or gone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe.common.http.places import GRACE_S, Places

MOST = 4
EVENTS = st.lists(
    st.tuples(st.sampled_from(["enter", "begin", "work", "rest", "leave", "linger", "promote"]), st.integers(0, 11)),
    max_size=80,
)


@settings(max_examples=300)
@given(events=EVENTS, step_s=st.sampled_from([0.0, 0.1, GRACE_S]))
def test_whatever_happens_the_bounds_hold(events: list[tuple[str, int]], step_s: float) -> None:
    places: Places[int] = Places(MOST, MOST)
    now, present = 0.0, set[int]()
    for event, connection in events:
        now += step_s
        if event == "enter" and connection not in present:
            has_place, victim = places.enter(connection, now)
            present.add(connection)
            if victim is not None:
                assert victim in present
                assert victim != connection
                pushed = places.demote(victim) if has_place else victim  # who had a place becomes a guest
                if pushed is not None:
                    assert pushed in present
                    present.discard(pushed)
                    places.leave(pushed)
            assert has_place == (connection in places._fresh)
        elif event == "promote" and connection in places._guests:
            has_place, victim = places.promote(connection, now)
            if victim is not None:
                present.discard(victim)
                places.leave(victim)
            assert has_place == (connection in places._fresh)
        elif event == "linger" and connection in present:
            if not places.linger(connection):
                present.discard(connection)
        elif event == "leave":
            places.leave(connection)
            present.discard(connection)
        elif event == "begin":
            places.begin(connection, now)
        elif event == "work":
            places.work(connection)
        elif event == "rest":
            places.rest(connection)
        parts = (places._idle, places._fresh, places._guests, places._working, places._lingering)
        assert sum(map(len, parts)) == len(present)
        assert set().union(*parts) == present
        assert places.num_taken <= MOST
        assert len(places._guests) <= MOST
        assert len(places._lingering) <= MOST


def test_who_is_idle_longest_leaves_then_who_has_been_sending_longest() -> None:
    places: Places[str] = Places(3, 3)
    for name in "abc":
        assert places.enter(name, 0.0) == (True, None)
        places.work(name)
    assert places.enter("d", 1.0) == (False, None), "all work"
    places.rest("b")
    places.rest("a")
    places.begin("b", 2.0)
    assert places.enter("e", 2.0) == (True, "a")
    assert places.enter("f", 2.0) == (False, None), "b began just now"
    assert places.enter("g", 2.0 + GRACE_S) == (True, "b")
    places.work("e")
    places.rest("e")
    assert places.promote("d", 3.0) == (True, "e")


def test_the_oldest_guest_leaves_for_a_new_one() -> None:
    places: Places[int] = Places(1, 1)
    assert places.enter(0, 0.0) == (True, None)
    places.work(0)
    assert places.enter(1, 0.0) == (False, None)
    assert places.enter(2, 0.0) == (False, 1)
