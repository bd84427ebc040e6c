"""Which form a checkpoint's model writes its calls in: what the operator says, else what its chat template shows."""

from __future__ import annotations

from elasticmoe.services.router.answer_parsers.deepseek import DeepSeekParser
from elasticmoe.services.router.answer_parsers.granite import GraniteParser
from elasticmoe.services.router.answer_parsers.hermes import HermesParser
from elasticmoe.services.router.answer_parsers.keyed_calls import GlmParser, QwenCoderParser
from elasticmoe.services.router.answer_parsers.mistral import MistralParser
from elasticmoe.services.router.answer_parsers.reasoning import FORMS
from elasticmoe.services.router.answer_parsers.tools import ToolParser

# The more particular first: several forms share `<tool_call>`.
PARSERS: tuple[tuple[type[ToolParser], str], ...] = (
    (DeepSeekParser, "<｜tool▁call▁begin｜>"),
    (MistralParser, "[TOOL_CALLS]"),
    (GlmParser, "<arg_key>"),
    (QwenCoderParser, "<function="),
    (GraniteParser, "<|tool_call|>"),
    (HermesParser, "<tool_call>"),
)
"""Each with what only its chat templates have."""

MARKS = frozenset(mark for parser, _ in PARSERS for mark in parser.specials) | frozenset(
    mark for marks in FORMS.values() for mark in marks
)
"""What structures answers, in all forms: a text that an answer quotes has no token of that name."""

NAMES = tuple(sorted(parser.name for parser, _ in PARSERS))


def parser_of(name: str, template: str) -> type[ToolParser] | None:
    """The parser of that name, one of NAMES; `auto`: by the chat template's text, None for a form that is not known."""
    if name == "auto":
        return next((parser for parser, sign in PARSERS if sign in template), None)
    return next(parser for parser, _ in PARSERS if parser.name == name)
