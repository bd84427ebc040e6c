"""Reading server-sent events (WHATWG HTML, 9.2.6), whoever sends them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from elasticmoe.common.protocol.errors import ElasticMoEError

EVENT_BYTES_MAX = 16 << 20
_BOM = b"\xef\xbb\xbf"


class ServerEvent(NamedTuple):
    """`data`: its lines, joined by line feeds. `comment`: of what is no event but a comment; it has no data."""

    data: bytes
    comment: bytes | None = None


class EventReader:
    """One stream's events, out of pieces whose borders mean nothing. An event that the stream's end cuts off is none.
    Names, ids and retry times of events are passed over: nobody asks for them."""

    def __init__(self, bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._bytes_max = bytes_max  # of one event
        self._rest: list[bytes] = []  # of a line
        self._is_first = True  # line
        self._skips_lf = False  # the last piece ended with a carriage return, which may be half of a line's end
        self._data: list[bytes] = []
        self._num_bytes = 0  # of both

    def feed(self, piece: bytes) -> Iterator[ServerEvent]:
        """The events that `piece` ends, and its comments. Raises ElasticMoEError `bad_stream` for one that is too
        large."""
        for line in self._lines(piece):
            if not line and self._data:
                yield ServerEvent(b"\n".join(self._data))
            if not line:
                self._data, self._num_bytes = [], sum(map(len, self._rest))
                continue
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if not field:
                yield ServerEvent(b"", comment=value)
            elif field == b"data":
                self._data.append(value)
                self._num_bytes += len(value) + 1  # its line feed: an event of empty lines has an end, too
        if self._num_bytes > self._bytes_max:
            raise ElasticMoEError(f"the server sent an event of over {self._bytes_max} bytes", code="bad_stream")

    def _lines(self, piece: bytes) -> list[bytes]:
        """Lines end with LF, CR, or both: `splitlines` also cuts at what may stand in the middle of one."""
        if self._skips_lf and piece:
            piece = piece.removeprefix(b"\n")
            self._skips_lf = False
        if b"\r" in piece:
            self._skips_lf = piece.endswith(b"\r")
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        first, *others = piece.split(b"\n")
        self._rest.append(first)
        self._num_bytes += len(first)
        if not others:
            return []
        lines = [b"".join(self._rest), *others[:-1]]
        self._num_bytes += len(others[-1]) - len(lines[0])
        self._rest = [others[-1]]
        if self._is_first:
            lines[0], self._is_first = lines[0].removeprefix(_BOM), False
        return lines


def events_of(pieces: Iterable[bytes]) -> Iterator[ServerEvent]:
    """The events of a whole stream, such as `response.iter_bytes()`. Raises as EventReader."""
    reader = EventReader()
    for piece in pieces:
        yield from reader.feed(piece)
