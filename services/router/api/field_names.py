"""What a request calls what stands in chat's words inside, so that an error names what the client sent.

Chat's checks, the template and the grammars know chat's fields alone. An interface that stands on chat says once what
each of them is called there, and its errors are renamed where they leave.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from elasticmoe.common.protocol.errors import ContextLengthExceeded, InvalidRequest

_MESSAGE = re.compile(r"messages\[(\d+)\](?:\.tool_calls\[(\d+)\])?")
_PLAIN_WORD = re.compile(r"[a-z]+")  # a field's name that sentences have, too


class Place(NamedTuple):
    """Where one of chat's messages stands in a request, and where each of its calls does, where those have places of
    their own."""

    message: str
    calls: Sequence[str] = ()


class FieldNames(NamedTuple):
    """`fields`: what each of chat's paths is called; the longest that a path begins with counts. `messages`: where each
    of chat's messages stands in the request; none: where chat's stand."""

    fields: Mapping[str, str]
    messages: Sequence[Place] = ()

    @contextmanager
    def in_errors(self) -> Iterator[None]:
        """Around what raises InvalidRequest in chat's words: goes on in this interface's."""
        try:
            yield
        except InvalidRequest as error:
            self._rename(error)
            raise

    def of(self, path: str) -> str:
        """What the request calls chat's `path`."""
        found = _MESSAGE.match(path)
        if found is not None:
            return self._message(found) + path[found.end() :]
        begins = [name for name in self.fields if path == name or path.startswith((f"{name}.", f"{name}["))]
        name = max(begins, key=len, default=None)
        return path if name is None else self.fields[name] + path[len(name) :]

    def _rename(self, error: InvalidRequest) -> None:
        """The text names the fields of `param` and those that nobody could take for a word of the sentence."""
        words = {error.param or "", *(name for name in self.fields if _PLAIN_WORD.fullmatch(name) is None)}
        if isinstance(error, ContextLengthExceeded):
            words.add(error.what)
        named = sorted(words & self.fields.keys(), key=len, reverse=True)
        text = _MESSAGE.sub(self._message, error.message)
        if named:
            # Not those that a client's schema has: quoted, in a path, or as a tool's name.
            before, after = r"(?<![\w.'\"/])(?<!parameters of )", r"(?![\w'\"])"
            words_in_text = re.compile(f"{before}(?:{'|'.join(map(re.escape, named))}){after}")
            text = words_in_text.sub(lambda found: self.fields[found[0]], text)
        error.rename(text, error.param and self.of(error.param))

    def _message(self, found: re.Match[str]) -> str:
        number = int(found[1])
        if number >= len(self.messages):
            return found[0]
        place, call = self.messages[number], found[2]
        if call is None:
            return place.message
        return place.calls[int(call)] if int(call) < len(place.calls) else f"{place.message}.tool_calls[{call}]"


PLAIN = FieldNames({})
CHAT = FieldNames({"prompt": "messages"})  # the prompt is what the template makes of them
COMPLETION_TOKENS = FieldNames({**CHAT.fields, "max_tokens": "max_completion_tokens"})  # of a chat that says it so
