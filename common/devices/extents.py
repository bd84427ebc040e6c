"""Which parts of a file are free: first fit over extents that are kept sorted and coalesced. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class FreeList:
    """The free parts of [0, nbytes). Every operation is O(number of free extents)."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._starts = [0]
        self._sizes = [nbytes]

    @property
    def extents(self) -> list[tuple[int, int]]:
        """Free extents as (offset, nbytes), ascending, no two adjacent."""
        return list(zip(self._starts, self._sizes, strict=True))

    def allocate(self, nbytes: int, window: int, phase: tuple[int, int] = (1, 0)) -> int | None:
        """Take the first free part that is large enough and lies in one window, which are `window` bytes each; its
        offset, or None when there is none. `phase`: a divisor, and what the offset leaves when divided by it."""
        if nbytes > window:
            return None
        divisor, rest = phase
        for at, (start, size) in enumerate(zip(self._starts, self._sizes, strict=True)):
            offset = start + (rest - start) % divisor
            while offset + nbytes <= start + size:
                if offset % window + nbytes <= window:
                    self._cut(at, offset, nbytes)
                    return offset
                offset = (offset // window + 1) * window
                offset += (rest - offset) % divisor
        return None

    def take(self, offset: int, nbytes: int) -> None:
        """Take exactly this extent. Raises ValueError when it is not all free."""
        at = bisect_right(self._starts, offset) - 1
        if at < 0 or nbytes <= 0 or offset + nbytes > self._starts[at] + self._sizes[at]:
            raise ValueError(f"extent ({offset}, {nbytes}) is not free")
        self._cut(at, offset, nbytes)

    def _cut(self, at: int, offset: int, nbytes: int) -> None:
        start, end = self._starts[at], self._starts[at] + self._sizes[at]
        parts = [(s, e - s) for s, e in ((start, offset), (offset + nbytes, end)) if e > s]
        self._starts[at : at + 1] = [s for s, _ in parts]
        self._sizes[at : at + 1] = [n for _, n in parts]

    def release(self, offset: int, nbytes: int) -> None:
        """Give an extent back and join it with its neighbours. Raises ValueError where part of it is already free."""
        at = bisect_left(self._starts, offset)
        end = offset + nbytes
        before_end = self._starts[at - 1] + self._sizes[at - 1] if at > 0 else 0
        after = self._starts[at] if at < len(self._starts) else self.nbytes
        if nbytes <= 0 or offset < 0 or before_end > offset or end > after:
            raise ValueError(f"extent ({offset}, {nbytes}) is not allocated")
        joins_before = at > 0 and before_end == offset
        joins_after = at < len(self._starts) and after == end
        low = at - joins_before
        start = self._starts[low] if joins_before else offset
        stop = end + self._sizes[at] if joins_after else end
        self._starts[low : at + joins_after] = [start]
        self._sizes[low : at + joins_after] = [stop - start]
