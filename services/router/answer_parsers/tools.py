"""What a parser of tool calls takes and gives, and the reading that all forms have in common.

A parser takes text as it comes, in pieces of any size, and gives parts: text for the client, the beginning of a call,
and pieces of a call's arguments. What it gives depends on the whole text alone, not on how it was cut: whether an
answer is streamed changes nothing. It holds back as little as it can: what may be the beginning of a marker, and what
stands before a call's name is known.

Models err. Text that begins like a call and turns out to be none is text, down to its marker. A call whose name is out
is a call, whatever its arguments become: they are what the model wrote, and the client looks at them anyway.
"""

from __future__ import annotations

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from elasticmoe.services.router.answer_parsers.parts import CallArguments, CallStart, Text

HELD_CHARS_MAX = 16_384  # before a call's name is known
READ_AGAIN_CHARS_MAX = 65_536  # of an answer: markers in what is no call are looked for, and only so often
PIECE_CHARS = 1_024  # read in one go: each step cuts what it has read off the buffer

_QUOTE = re.compile(r'["\\]')
_NAME = re.compile(r"[\w.:/-]{1,256}")

Schemas = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's parameters, by the tool's name."""


ToolPart = Text | CallStart | CallArguments
Reading = Generator[None, None, None]
"""Reads from the buffer; yields where it needs more of the answer."""


class NoCall(Exception):
    """What began like a call is none."""


class _AtEnd(Exception):
    """The answer is over where more was needed."""


class ToolParser(ABC):
    """Of one answer. `markers`: what a call, or a run of them, may begin with; the first in the text counts."""

    name: str
    markers: tuple[str, ...]
    specials: tuple[str, ...] = ()
    """Special tokens of the form, which must not be left out of the text: a checkpoint may have them as plain ones."""

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self._buffer = ""
        self._marker = ""  # that the call which is read began with
        self._is_over = False
        self._parts: list[ToolPart] = []
        self._opening = ""  # the marker, until a call's name is out
        self._taken: list[str] = []  # of what follows it, while no name is out
        self._num_held = 0
        self._num_read_again = 0
        self._before = ""  # spaces before the marker: no text where a call follows
        self._is_open = False  # a call's name is out and its end is not
        self._has_called = False
        self._is_after_call = False  # nothing but spaces since the last call
        self._reading = self._read()
        next(self._reading)

    def feed(self, text: str) -> list[ToolPart]:
        """What `text` lets out."""
        for begin in range(0, len(text), PIECE_CHARS):
            self._buffer += text[begin : begin + PIECE_CHARS]
            self._reading.send(None)
        return self._let_out()

    def finish(self) -> list[ToolPart]:
        """What is still held, at the end of the answer."""
        if not self._is_over:
            self._is_over = True
            self._reading.send(None)
        return self._let_out()

    def _let_out(self) -> list[ToolPart]:
        parts, self._parts = _joined(self._parts), []
        return parts

    @staticmethod
    def new_call_id() -> str:
        """What the answer to a call names it by, in the form that the model's chat template takes."""
        return f"call_{secrets.token_hex(12)}"

    # ---- the form's own ----------------------------------------------------------------------------------------------

    @abstractmethod
    def _calls(self) -> Reading:
        """Read what follows the marker, to its end. Raises NoCall for what is no call."""

    # ---- text, calls, text -------------------------------------------------------------------------------------------

    def _read(self) -> Reading:
        yield
        while not (self._is_over and not self._buffer):
            marker = yield from self._text()
            if marker is None:
                break
            self._marker = self._opening = marker
            self._taken, self._num_held = [], 0
            try:
                yield from self._calls()
                self._taken = []
            except NoCall:
                self._give_up()
            except _AtEnd:
                if self._is_after_call:  # what is cut off is the end of a call, or a further one without its name
                    self._opening, self._before, self._buffer = "", "", ""
                    self._taken = []
                self._give_up()
            self._is_open = False
        while True:
            yield

    def _text(self) -> Generator[None, None, str | None]:
        """Text up to a marker, which is taken; None where the answer ends first. Spaces beside calls are no text."""
        spaces: list[str] = []  # whether they stand beside a call is not known yet
        while True:
            at, marker = _first(self._buffer, self.markers)
            keep = at if marker else len(self._buffer) - _partial(self._buffer, self.markers)
            text = self._take(keep)
            said = text.rstrip()
            if said:
                self._put("".join(spaces) + said)
                spaces.clear()
            spaces.append(text[len(said) :])
            if marker:
                self._take(len(marker))
                self._before = "".join(spaces)
                return marker
            if self._is_over:
                rest = self._take(len(self._buffer))
                self._put("" if self._is_after_call else "".join(spaces) + rest)
                return None
            yield

    def _put(self, text: str) -> None:
        """Text for the client; what is only space after a call is left out."""
        if text and not (self._has_called and not text.strip()):
            self._is_after_call = False
            self._parts.append(Text(text))

    def _give_up(self) -> None:
        """The marker is text, unless a call has come of it, and what follows it is read again, while it is not much:
        an answer of markers alone would be read for ever."""
        text, taken = self._before + self._opening, "".join(self._taken)
        self._before, self._opening, self._taken = "", "", []
        self._num_read_again += self._num_held
        if self._num_read_again > READ_AGAIN_CHARS_MAX:
            self._put(text + taken)
            return
        self._put(text)
        self._buffer = taken + self._buffer

    def _start(self, name: str) -> None:
        """A call's name is out. Raises NoCall for what is no name, such as prose behind a marker that it mentions."""
        if name not in self._schemas and _NAME.fullmatch(name) is None:
            raise NoCall
        self._opening, self._taken, self._num_held, self._before = "", [], 0, ""
        self._is_open = self._has_called = self._is_after_call = True
        self._parts.append(CallStart(name))

    def _arguments(self, text: str) -> None:
        if text:
            self._parts.append(CallArguments(text))

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _take(self, length: int) -> str:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken

    def _eat(self, length: int) -> str:
        """Take what belongs to a call: it is text after all where the call turns out to be none. How much of it was
        taken until then does not depend on how the text was cut."""
        if self._is_open:
            return self._take(length)
        taken = self._take(min(length, HELD_CHARS_MAX - self._num_held))
        self._taken.append(taken)
        self._num_held += len(taken)
        if len(taken) < length:
            raise NoCall
        return taken

    def _need(self, length: int) -> Reading:
        """Wait for so many characters."""
        while len(self._buffer) < length:
            if self._is_over:
                raise _AtEnd
            yield

    def _spaces(self) -> Reading:
        """Skip spaces, to the next character."""
        while True:
            self._eat(len(self._buffer) - len(self._buffer.lstrip()))
            if self._buffer:
                return
            yield from self._need(1)

    def _has(self, literal: str) -> Generator[None, None, bool]:
        """Take `literal` where it comes next."""
        while len(self._buffer) < len(literal) and literal.startswith(self._buffer):
            if self._is_over:
                raise _AtEnd
            yield
        if not self._buffer.startswith(literal):
            return False
        self._eat(len(literal))
        return True

    def _which(self, *literals: str) -> Generator[None, None, str]:
        """Take the one of `literals` that comes next; empty for none of them."""
        for literal in literals:
            if (yield from self._has(literal)):
                return literal
        return ""

    def _until(
        self, ends: Sequence[str], put: Callable[[str], None], length_max: int | None = None
    ) -> Generator[None, None, str]:
        """What comes before the first of `ends` goes to `put`, piece by piece; that end is taken and returned. Raises
        NoCall where it is longer than `length_max`."""
        length = 0
        while True:
            at, end = _first(self._buffer, ends)
            keep = at if end else len(self._buffer) - _partial(self._buffer, ends)
            length += keep
            if length_max is not None and length > length_max:
                self._eat(keep - (length - length_max))
                raise NoCall
            put(self._eat(keep))
            if end:
                self._eat(len(end))
                return end
            if self._is_over:
                raise _AtEnd
            yield

    def _until_whole(self, ends: Sequence[str], put: Callable[[str], None]) -> Generator[None, None, str]:
        """As `_until`; but where JSON is read, an end that stands in one of its texts is a part of it. JSON has no line
        end there: what begins with one always ends it."""
        quotes = _Quotes()

        def note(text: str) -> None:
            quotes.read(text)
            put(text)

        while True:
            end = yield from self._until(ends, note)
            if not quotes.is_open or end.startswith("\n"):
                return end
            note(end)


class CallsInstead:
    """Reads answers that are either calls from their beginning on, spaces aside, or nothing but text."""

    def __init__(self, parser: ToolParser) -> None:
        self._parser = parser
        self._held = ""  # while it may be either
        self._has_calls: bool | None = None

    def feed(self, text: str) -> list[ToolPart]:
        """As a parser's."""
        held, self._held = self._held + text, ""
        if self._has_calls is None:
            begins = held.lstrip()
            if begins.startswith(self._parser.markers):
                self._has_calls = True
            elif _partial(begins, self._parser.markers) == len(begins):
                self._held = held
                return []
            else:
                self._has_calls = False
        if self._has_calls:
            return self._parser.feed(held)
        return [Text(held)] if held else []

    def finish(self) -> list[ToolPart]:
        """As a parser's."""
        held, self._held = self._held, ""
        return [Text(held)] if held else self._parser.finish()

    def new_call_id(self) -> str:
        """As a parser's."""
        return self._parser.new_call_id()


class _Quotes:
    """Whether what was read ends within a text of JSON. What does not begin as JSON has none."""

    def __init__(self) -> None:
        self.is_open = False
        self._is_json: bool | None = None
        self._is_escaped = False

    def read(self, text: str) -> None:
        """What comes next."""
        if self._is_json is None:
            text = text.lstrip()
            self._is_json = text[0] in '{["' if text else None
        if not text or not self._is_json:
            return
        at, self._is_escaped = int(self._is_escaped), False
        while found := _QUOTE.search(text, at):
            at = found.end()
            if found.group() == '"':
                self.is_open = not self.is_open
            elif self.is_open:
                self._is_escaped = at == len(text)
                at += 1


def _first(text: str, words: Sequence[str]) -> tuple[int, str]:
    """Where the first of `words` begins, the longest of those that begin there; no word where there is none."""
    found = [(at, -len(word), word) for word in words if (at := text.find(word)) >= 0]
    at, _, word = min(found, default=(0, 0, ""))
    return at, word


def _partial(text: str, words: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the beginning of one of `words`."""
    longest = 0
    for word in words:
        for length in range(min(len(word) - 1, len(text)), longest, -1):
            if text.endswith(word[:length]):
                longest = length
                break
    return longest


def _joined(parts: list[ToolPart]) -> list[ToolPart]:
    """Neighbours of a kind as one."""
    joined: list[ToolPart] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Text) and isinstance(last, Text):
            joined[-1] = Text(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments):
            joined[-1] = CallArguments(last.text + part.text)
        else:
            joined.append(part)
    return joined
