"""`bench recovery`: gaps from a router's history."""

from __future__ import annotations

import json

from elasticmoe.cli.bench.recovery_gaps import Gaps, gaps_around, gaps_within


def history(*events: tuple[float, str, str, str]) -> list[bytes]:
    return [json.dumps({"t": t, "event": event, "id": name, "rank": rank}).encode() for t, event, name, rank in events]


def test_gaps_of_the_killed_rank_s_streams_and_of_the_others() -> None:
    lines = history(
        (0.0, "accepted", "a", "r0t0"),
        (0.0, "accepted", "b", "r1t0"),
        (0.0, "accepted", "ended", "r0t0"),
        (0.1, "accepted", "waiting", "r0t0"),
        (0.5, "chunk", "a", ""),
        (0.5, "chunk", "ended", ""),
        (0.6, "terminal", "ended", ""),
        (0.9, "chunk", "a", ""),
        (0.95, "chunk", "b", ""),
        (1.25, "chunk", "b", ""),  # the kill was at 1.0
        (1.3, "accepted", "late", "r1t0"),
        (1.4, "chunk", "a", ""),
        (1.45, "chunk", "late", ""),
        (1.5, "chunk", "a", ""),
        (1.5, "terminal", "b", ""),
        (8.0, "chunk", "a", ""),  # began long after all was well again
        (9.0, "chunk", "late", ""),
    )
    found = gaps_around([*lines, b'{"t": 9.2, "ev'], "r0t0", 1.0, 1.45, 9.5)
    assert (round(found.of_rank, 6), round(found.of_others, 6), found.num_streams) == (0.5, 0.3, 1)


def test_a_stream_that_never_goes_on_counts_to_the_end() -> None:
    lines = history(
        (0.0, "accepted", "a", "r0t0"),
        (0.5, "chunk", "a", ""),
        (0.6, "moved", "a", "r1t0"),
        (2.0, "accepted", "b", "r0t0"),
    )
    assert gaps_around(lines, "r1t0", 1.0, 1.1, 4.5) == Gaps(4.0, -1.0, 1)
    assert gaps_around(lines[:2], "r0t0", 1.0, 1.1, 4.5) == Gaps(4.0, -1.0, 1)  # nothing has come since
    assert gaps_around([], "r1t0", 1.0, 1.1, 4.5) == Gaps(-1.0, -1.0, 0)
    on_its_way = history((1.01, "chunk", "a", ""))  # at the kill
    assert gaps_around([*lines[:3], *on_its_way], "r1t0", 1.0, 1.1, 4.51) == Gaps(3.5, -1.0, 1)


def test_a_stream_that_ends_without_another_token_counts_to_its_end_and_services_count_all_streams() -> None:
    lines = history(
        (0.0, "accepted", "a", "r0t0"),
        (0.0, "accepted", "b", "r1t0"),
        (0.5, "chunk", "a", ""),
        (0.9, "chunk", "b", ""),
        (1.2, "chunk", "b", ""),
        (1.2, "terminal", "b", ""),
        (3.0, "terminal", "a", ""),
    )
    found = gaps_around(lines, "", 1.0, 4.0, 4.0)
    assert (found.of_rank, found.of_others, found.num_streams) == (-1.0, 2.5, 2)


def test_all_gaps_that_ended_within_a_time() -> None:
    lines = history(
        (0.5, "chunk", "a", ""),
        (0.9, "chunk", "a", ""),
        (1.1, "chunk", "a", ""),
        (1.2, "chunk", "b", ""),
        (1.3, "terminal", "b", ""),
        (1.9, "chunk", "b", ""),  # another request of that name
        (2.0, "chunk", "a", ""),
        (2.6, "chunk", "a", ""),
    )
    assert [round(gap, 6) for gap in gaps_within([*lines, b"{"], 1.0, 2.5)] == [0.2, 0.9]
    # And those that last at its end, or that the stream's end has ended.
    with_open = gaps_within([*lines, b"{"], 1.0, 2.5, with_open=True)
    assert [round(gap, 6) for gap in with_open] == [0.1, 0.2, 0.5, 0.6, 0.9]
