"""The parts of an answer, as parsers give them."""

from __future__ import annotations

from typing import NamedTuple


class Reasoning(NamedTuple):
    """What the model thinks."""

    text: str


class Text(NamedTuple):
    """What the client is told as content."""

    text: str


class CallStart(NamedTuple):
    """A call begins; its arguments follow."""

    name: str


class CallArguments(NamedTuple):
    """The next piece of the JSON text of the last call's arguments."""

    text: str


AnswerPart = Reasoning | Text | CallStart | CallArguments
