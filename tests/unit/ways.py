"""What a walk through the services passes, found by tracing, and what the page says of it."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
SERVICES = ("scaler", "hmm", "router", "worker")


def hands_of(**functions: Callable[..., Any]) -> dict[CodeType, str]:
    """Where what walks goes from hand to hand: functions, by what is done there."""
    return {function.__code__: name for name, function in functions.items()}


class Trace:
    """`files`: those of the services, in the order in which they were first on the stack at one of `hands`; what only
    carries is left out. `hands`: those that were reached, in order. `returns`: how the walk came back to a file that
    it had left, or that it was called from: (hand, file).

    A file is left where it is on the stack of one hand and not on the next one's. A coroutine that waits for what it
    called has not left.
    """

    def __init__(self, hands: Mapping[CodeType, str], carriers: frozenset[str] = frozenset()) -> None:
        self.files: list[str] = []
        self.hands: list[str] = []
        self.returns: list[tuple[str, str]] = []
        self._hands = hands
        self._carriers = carriers
        self._entered: dict[str, set[FrameType]] = {}
        self._last: set[str] = set()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """See sys.setprofile. A coroutine that goes on is a call too."""
        if event != "call" or frame.f_code not in self._hands:
            return
        stack = self._stack(frame)
        if stack and frame in self._entered.get(stack[-1][0], ()):
            return
        hand = self._hands[frame.f_code]
        self.hands.append(hand)
        names = [name for number, (name, _) in enumerate(stack) if not number or stack[number - 1][0] != name]
        left = set(self._entered) - self._last
        self.returns += [
            (hand, name)
            for number, name in enumerate(names)
            if name in names[:number]
            or (name in left and not self._entered[name] & {at for known, at in stack if known == name})
        ]
        for name, at in stack:
            self._entered.setdefault(name, set()).add(at)
        self.files += [name for number, name in enumerate(names) if name not in {*self.files, *names[:number]}]
        self._last = set(names)

    def _stack(self, frame: FrameType) -> list[tuple[str, FrameType]]:
        """Outermost first."""
        stack: list[tuple[str, FrameType]] = []
        at: FrameType | None = frame
        while at is not None:
            _, found, path = at.f_code.co_filename.rpartition("/services/")
            if found and (name := path.removesuffix(".py")) not in self._carriers:
                stack.append((name, at))
            at = at.f_back
        return stack[::-1]

    @contextmanager
    def follow(self) -> Iterator[None]:
        """What is done here, in threads that begin here too."""
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]


def said(way: str) -> list[str]:
    """The files of a row of the page's table of ways; a service is named where it changes."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    row = re.search(rf"^\| {way} \|(.*)\|$", page, re.MULTILINE)
    assert row is not None
    files, service = [], ""
    for name in re.findall(r"`([^`]+)`", row[1]):
        first = name.split("/")[0]
        service = first if first in SERVICES else service
        files.append(name if first == service else f"{service}/{name}")
    return files
