"""Calls that are JSON: an object `{"name": …, "arguments": {…}}`, or an array of them.

The arguments go to the client as the model writes them, character by character, so their JSON is found by its brackets
and quotes alone and is not parsed. Arguments that are a text hold JSON themselves, as OpenAI's interface has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator

from elasticmoe.services.router.answer_parsers.tools import NoCall, Reading, ToolParser

ARGUMENTS = ("arguments", "parameters")
_STOPS = re.compile(r'["{}\[\]]')
_QUOTE = re.compile(r'["\\]')
_SCALAR_END = re.compile(r"[\s,\]}]")


class JsonCalls(ToolParser):
    """Reads call objects for the forms that have them."""

    def _calls(self) -> Reading:
        """One object, or an array."""
        yield from self._spaces()
        if (yield from self._has("[")):
            yield from self._array()
        else:
            yield from self._object()

    def _array(self) -> Reading:
        """After the bracket that opens it."""
        while True:
            yield from self._spaces()
            if (yield from self._has("]")):
                return
            yield from self._object()
            self._is_open = False
            yield from self._spaces()
            if not (yield from self._has(",")):
                if not (yield from self._has("]")):
                    raise NoCall
                return

    def _object(self) -> Reading:
        """One call with its braces. Its name and arguments may come in either order, and other members between."""
        if not (yield from self._has("{")):
            raise NoCall
        name, held = "", list[str]()
        has_arguments = False
        while True:
            yield from self._spaces()
            if (yield from self._has("}")):
                break
            key = yield from self._text_value()
            yield from self._spaces()
            if not (yield from self._has(":")):
                raise NoCall
            yield from self._spaces()
            if key == "name" and not name:
                name = yield from self._text_value()
                self._start(name)
                self._arguments("".join(held))
            elif key in ARGUMENTS and not has_arguments:
                has_arguments = True
                yield from self._argument_value(self._arguments if name else held.append)
            else:
                yield from self._value(_ignore)
            yield from self._spaces()
            if not (yield from self._has(",")) and not self._buffer.startswith("}"):
                if name and has_arguments:
                    return  # the last brace is missing; what follows may be the form's own end
                raise NoCall
        if not name:
            raise NoCall
        if not has_arguments:
            self._arguments("{}")

    def _argument_value(self, put: Callable[[str], None]) -> Reading:
        """As it is written; a text that holds them, decoded where it can be."""
        if not self._buffer.startswith('"'):
            yield from self._value(put)
            return
        pieces: list[str] = []
        yield from self._quoted(pieces.append)
        text = "".join(pieces)
        try:
            put(_decoded(text))
        except ValueError:
            put(text)

    # ---- values ------------------------------------------------------------------------------------------------------

    def _text_value(self) -> Generator[None, None, str]:
        """A JSON text, decoded."""
        pieces: list[str] = []
        if not self._buffer.startswith('"'):
            raise NoCall
        yield from self._quoted(pieces.append)
        try:
            return _decoded("".join(pieces))
        except ValueError:
            raise NoCall from None

    def _value(self, put: Callable[[str], None]) -> Reading:
        """Any JSON value as it is written, to `put`."""
        if self._buffer.startswith('"'):
            yield from self._quoted(put)
        elif self._buffer.startswith(("{", "[")):
            yield from self._nested(put)
        else:
            while not (end := _SCALAR_END.search(self._buffer)):
                put(self._eat(len(self._buffer)))
                yield from self._need(1)
            put(self._eat(end.start()))

    def _nested(self, put: Callable[[str], None]) -> Reading:
        depth = 0
        while True:
            stop = _STOPS.search(self._buffer)
            if stop is None:
                put(self._eat(len(self._buffer)))
                yield from self._need(1)
                continue
            put(self._eat(stop.start()))
            if stop.group() == '"':
                yield from self._quoted(put)
                continue
            depth += 1 if stop.group() in "{[" else -1
            put(self._eat(1))
            if depth == 0:
                return

    def _quoted(self, put: Callable[[str], None]) -> Reading:
        """A text with its quotes, which comes next."""
        put(self._eat(1))
        while True:
            stop = _QUOTE.search(self._buffer)
            if stop is None:
                put(self._eat(len(self._buffer)))
                yield from self._need(1)
            elif stop.group() == '"':
                put(self._eat(stop.end()))
                return
            else:
                put(self._eat(stop.start()))
                yield from self._need(2)
                put(self._eat(2))


def _decoded(text: str) -> str:
    """A JSON text's value. Raises ValueError for none, and for one that is no Unicode: halves of surrogate pairs."""
    value = str(json.loads(text, strict=False))
    value.encode()
    return value


def _ignore(_: str) -> None:
    """What no client is told."""
