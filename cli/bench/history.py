"""The events of a router's history."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec


class Event(msgspec.Struct):
    """One line. `t`: seconds of the monotonic clock; `id`: the request; `rank`: where it is from then on, if news."""

    t: float
    event: str
    id: str = ""
    rank: str = ""


_decoder = msgspec.json.Decoder(Event)


def events(lines: Iterable[bytes]) -> Iterator[Event]:
    """All whole lines, in order; half a line was being written."""
    for line in lines:
        try:
            yield _decoder.decode(line)
        except msgspec.DecodeError:
            continue
