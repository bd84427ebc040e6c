"""How an answer's text is read: what of it is thinking, what are calls, and what the client is told of them."""

from __future__ import annotations

from typing import NamedTuple

from elasticmoe.services.router.answer_parsers.parts import AnswerPart, CallStart, Reasoning, Text
from elasticmoe.services.router.answer_parsers.reasoning import (
    Marks,
    ReasoningParser,
    ThinkingParser,
    UnseparatedParser,
)
from elasticmoe.services.router.answer_parsers.tools import CallsInstead, ToolParser
from elasticmoe.services.router.api.tool_use import ToolUse
from elasticmoe.services.router.api.turns import Turns
from elasticmoe.services.router.dispatch.streams import Stream

PIECE_CHARS = 2_048  # that are read in one go: 20 ms of the worst that a model can write


class AnswerForm(NamedTuple):
    """Of one request's answers. `tools`: those that may be called; `marks`: around what is thought, where it is told
    apart; `is_inside`: the prompt ends with the opening one; `tells_reasoning`: the client wants to read it;
    `is_separated`: apart from the text."""

    tools: ToolUse | None = None
    marks: Marks | None = None
    is_inside: bool = False
    tells_reasoning: bool = True
    is_separated: bool = True

    @property
    def specials(self) -> tuple[str, ...]:
        """Special tokens that are a part of the form."""
        return (*(self.tools.parser.specials if self.tools else ()), *(self.marks or ()))


def _parser(tools: ToolUse) -> ToolParser | CallsInstead:
    parser = tools.parser(tools.schemas)
    return CallsInstead(parser) if tools.is_instead else parser


class AnswerReader:
    """Of one choice, whose text comes in pieces."""

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        kind: type[ThinkingParser] = ReasoningParser if form.is_separated else UnseparatedParser
        self._reasoning = kind(form.marks, is_inside=form.is_inside) if form.marks else None
        self._tools = _parser(form.tools) if form.tools else None
        self.num_calls = 0

    def take(self, text: str, *, is_last: bool) -> list[AnswerPart]:
        """What of the answer's next piece the client is told."""
        parts: list[AnswerPart] = []
        for part in self._thoughts_and_text(text, is_last=is_last):
            if isinstance(part, Text) and self._tools is not None:
                parts += self._tools.feed(part.text)
            elif isinstance(part, Reasoning) and not self._form.is_separated:
                parts.append(Text(part.text))
            else:
                parts.append(part)
        if is_last and self._tools is not None:
            parts += self._tools.finish()
        return [part for part in parts if self._is_told(part)]

    async def take_all(self, text: str, turns: Turns) -> list[AnswerPart]:
        """What of a long text the client is told, read in pieces, between which others have their turn."""
        parts: list[AnswerPart] = []
        for start in range(0, len(text), PIECE_CHARS):
            if start:
                await turns.wait()
            parts += self.take(text[start : start + PIECE_CHARS], is_last=False)
        return parts

    def _thoughts_and_text(self, text: str, *, is_last: bool) -> list[Reasoning | Text]:
        if self._reasoning is None:
            return [Text(text)] if text else []
        return self._reasoning.feed(text) + (self._reasoning.finish() if is_last else [])

    def _is_told(self, part: AnswerPart) -> bool:
        if isinstance(part, Reasoning):
            return self._form.tells_reasoning
        if isinstance(part, Text):
            return True
        self.num_calls += isinstance(part, CallStart)
        return self.num_calls <= 1 or self._form.tools is None or not self._form.tools.is_single

    def finish_reason(self, reason: str) -> str:
        """An answer that ends as it should and has calls ends for them."""
        return "tool_calls" if self.num_calls and reason == "stop" else reason

    def num_thought(self, stream: Stream) -> int:
        """Of the tokens of the choice's `stream`, those before the mark that closes the thinking; while that has not
        come, all."""
        thinking = self._reasoning
        if thinking is None:
            return 0
        if thinking.is_thinking:
            return stream.num_tokens
        return stream.tokens_within(thinking.num_thought) if thinking.num_thought else 0

    def new_call_id(self) -> str:
        """In the form that the model's chat template takes."""
        assert self._tools is not None, "without tools there are no calls"
        return self._tools.new_call_id()
