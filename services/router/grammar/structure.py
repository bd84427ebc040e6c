"""What an answer has to look like, as a request asks for it. Pure."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.common.protocol.limits import GRAMMAR_BYTES_MAX

CHOICES_MAX = 1_024

StructureKind = Literal["json", "regex", "choice", "grammar", "calls"]


class Structure(msgspec.Struct, frozen=True):
    """`text`: a JSON schema, a regular expression, a JSON list of texts, a grammar in Lark or GBNF, or WrittenCalls as
    JSON. `param`: the request's word for it. `instead`: what the answer may be as well, as the model likes."""

    kind: StructureKind
    text: str
    param: str
    instead: Structure | None = None


class WrittenTool(msgspec.Struct, frozen=True):
    """One that may be called. `parameters`: the JSON schema of its arguments; None: it takes none. `is_free`: they may
    be any object."""

    name: str
    parameters: dict[str, Any] | None = None
    is_free: bool = False


class WrittenCalls(msgspec.Struct, frozen=True):
    """An answer of calls, in one of the forms of answer_parsers/forms.py. `is_single`: of one. `is_in_text`: calls may
    stand in any text; else there is nothing but calls."""

    form: str
    tools: list[WrittenTool]
    is_single: bool
    is_in_text: bool = False


class Thought(msgspec.Struct, frozen=True):
    """What comes before the answer: thinking between two marks. `is_inside`: the first one has been written; else there
    may be none of it."""

    open: str
    close: str
    is_inside: bool


def structure(kind: StructureKind, text: str, param: str) -> Structure:
    """Raises InvalidRequest for one that is too large to be looked at."""
    check_size(text, param)
    return Structure(kind, text, param)


def check_size(text: str, param: str) -> None:
    """Raises InvalidRequest for more than a grammar may have."""
    if (size := len(text.encode())) > GRAMMAR_BYTES_MAX:
        raise too_large(f"{param} has {size} bytes; the limit is {GRAMMAR_BYTES_MAX}", param)


def too_large(text: str, param: str) -> InvalidRequest:
    """The refusal of what exceeds a bound."""
    return InvalidRequest(text, code="grammar_too_large", param=param)
