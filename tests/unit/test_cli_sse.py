"""Server-sent events as WHATWG HTML 9.2.6 has them: the cases of its grammar, and its own examples."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe.cli.sse import EventReader, ServerEvent, events_of
from elasticmoe.common.protocol.errors import ElasticMoEError


def read(stream: bytes) -> list[bytes]:
    return [event.data for event in events_of([stream]) if event.comment is None]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a\n\n", [b" a"]),  # one space goes, not two
        (b"data:\ta\n\n", [b"\ta"]),
        (b"data: a\r\n\r\n", [b"a"]),
        (b"data: a\r\r", [b"a"]),
        (b"data: a\r\ndata: b\rdata: c\n\n", [b"a\nb\nc"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),  # a byte order mark
        (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),  # and what is none
        (b"data: a", []),  # the stream's end ends no event
        (b"data: a\n", []),
        (b"data\n\n", [b""]),  # a field without a colon has an empty value
        (b"data\ndata\n\n", [b"\n"]),  # two of them: one line feed (the specification's example)
        (b"data:\n", []),  # the same example's last block, which no blank line follows
        (b"data:test\n\ndata: test\n\n", [b"test"] * 2),  # the specification's
        (b": test stream\n\ndata: first event\nid: 1\n\n", [b"first event"]),
        (b"event: add\ndata: 73857293\n\n", [b"73857293"]),
        (b"event: add\n\ndata: a\n\n", [b"a"]),  # without data it is none, and its name goes
        (b"id: 1\nretry: 10000\nnonsense: x\ndata: a\n\n", [b"a"]),
        (b"Data: a\n data: b\n\n", []),  # names are as they are written
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [b"YHOO\n+2\n10"]),  # the specification's
        (b'data: {"a": "b: c"}\n\n', [b'{"a": "b: c"}']),
    ],
)
def test_the_grammar(stream: bytes, events: list[bytes]) -> None:
    assert read(stream) == events


def test_comments_are_told() -> None:
    assert list(events_of([b": heartbeat\n\n:\n:x\n"])) == [
        ServerEvent(b"", comment) for comment in (b"heartbeat", b"", b"x")
    ]


@given(
    st.lists(st.sampled_from([b"data: a", b"data:b", b"data", b": c", b"event: e", b"", b"id: 1", b"\xef\xbb\xbf"])),
    st.lists(st.sampled_from([b"\n", b"\r\n", b"\r"]), min_size=1),
    st.lists(st.integers(0, 60)),
)
def test_where_the_pieces_end_means_nothing(lines: list[bytes], ends: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(line + ends[number % len(ends)] for number, line in enumerate(lines))
    at = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[begin:end] for begin, end in pairwise(at)]
    assert list(events_of(pieces)) == list(events_of([stream]))
    assert list(events_of([stream[number : number + 1] for number in range(len(stream))])) == list(events_of([stream]))


@pytest.mark.parametrize("piece", [b"x" * 1000, b"data: " + b"x" * 999 + b"\n", b"data\n" * 1000])
def test_an_event_without_end_is_bounded(piece: bytes) -> None:
    reader = EventReader(10_000)
    for _ in range(10):
        assert not list(reader.feed(piece))
    with pytest.raises(ElasticMoEError, match="an event of over 10000 bytes") as raised:
        list(reader.feed(piece))
    assert raised.value.code == "bad_stream"


def test_what_has_been_read_does_not_count() -> None:
    reader = EventReader()
    for _ in range(3):
        (event,) = reader.feed(b"data: " + b"x" * (6 << 20) + b"\n\n")
        assert len(event.data) == 6 << 20
