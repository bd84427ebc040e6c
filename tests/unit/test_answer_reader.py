"""Long answers are read in pieces, between which others have their turn, and nothing depends on that."""

from __future__ import annotations

import asyncio
import json

from elasticmoe.services.router.answer_parsers.forms import parser_of
from elasticmoe.services.router.answer_parsers.parts import AnswerPart, CallArguments, Text
from elasticmoe.services.router.api.answer_reader import PIECE_CHARS, AnswerForm, AnswerReader
from elasticmoe.services.router.api.tool_use import ToolUse
from elasticmoe.services.router.api.turns import Turns

CALL = "<tool_call>" + json.dumps({"name": "f", "arguments": {"x": "y" * 3 * PIECE_CHARS}}) + "</tool_call>"


class Counted(Turns):
    """Turns that know how often somebody waited for one."""

    num_waits = 0

    async def wait(self) -> None:
        self.num_waits += 1
        await super().wait()


def form() -> AnswerForm:
    parser = parser_of("hermes", "")
    assert parser is not None
    return AnswerForm(ToolUse(parser, {}, is_single=False))


def joined(parts: list[AnswerPart]) -> tuple[str, str]:
    said = "".join(part.text for part in parts if isinstance(part, Text))
    return said, "".join(part.text for part in parts if isinstance(part, CallArguments))


def test_a_long_answer_leaves_others_their_turns() -> None:
    async def read(text: str, turns: Turns) -> list[AnswerPart]:
        reader = AnswerReader(form())
        return await reader.take_all(text, turns) + reader.take("", is_last=True)

    text = "So. " * PIECE_CHARS + CALL
    turns = Counted()
    assert joined(asyncio.run(read(text, turns))) == joined(AnswerReader(form()).take(text, is_last=True))
    assert turns.num_waits == (len(text) - 1) // PIECE_CHARS
    turns = Counted()
    assert joined(asyncio.run(read("Hello", turns))) == ("Hello", "")
    assert turns.num_waits == 0
