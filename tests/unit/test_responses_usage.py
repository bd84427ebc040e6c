"""How many of an answer's tokens were thinking: those before the mark that closes it, however they came."""

from __future__ import annotations

import asyncio

import pytest

from elasticmoe.cli.models.byte_tokenizer import EOS_ID, build_byte_tokenizer
from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.common.protocol.router import Delta
from elasticmoe.services.router.answer_parsers.reasoning import FORMS
from elasticmoe.services.router.api.answer_reader import AnswerForm, AnswerReader
from elasticmoe.services.router.dispatch.streams import Ending, Stream
from elasticmoe.services.router.text.detokenizer import TextStream, TokenTable

TABLE = TokenTable(build_byte_tokenizer())
MARKS = FORMS["think"]
END = MARKS.close.encode()


def num_thought(ids: list[int], form: AnswerForm, per_step: int, *stops: str) -> int:
    submit = Submit("r", (1,), 1_000, Sampling(seed=1))
    stream = Stream("r", submit, TextStream(TABLE, stops=stops), asyncio.Event(), now=0.0)
    reader = AnswerReader(form)
    for at in range(0, len(ids), per_step):
        stream.accept(Delta("r", at, tuple(ids[at : at + per_step])), 1.0)
        reader.take(stream.take().text, is_last=False)
        assert reader.num_thought(stream) <= stream.num_tokens
    stream.end(Ending("finish", "stop"))
    reader.take(stream.take().text, is_last=True)
    return reader.num_thought(stream)


@pytest.mark.parametrize("is_separated", [True, False])
@pytest.mark.parametrize("per_step", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "is_inside", "num"),
    [
        ("Å hm.\n</think>\n\nYes </think>", True, len("Å hm.\n".encode())),
        ("\n<think>Å</think>\n\nYes", False, len("\n<think>Å".encode())),
        ("</think>Yes", True, 0),
        ("Yes </think> no", False, 0),
        ("Hm. Å </thi", True, len("Hm. Å </thi".encode())),
        ("<think>Hm", False, len("<think>Hm")),
        ("<thin", False, 0),
        ("", True, 0),
    ],
)
def test_tokens_before_the_end_of_the_thinking(
    text: str, is_inside: bool, num: int, per_step: int, is_separated: bool
) -> None:
    form = AnswerForm(marks=MARKS, is_inside=is_inside, is_separated=is_separated)
    assert num_thought(list(text.encode()), form, per_step) == num
    assert num_thought(list(text.encode()), AnswerForm(), per_step) == 0


def test_tokens_without_a_text_count_and_what_stops_an_answer_does_not_end_the_thinking() -> None:
    form = AnswerForm(marks=MARKS, is_inside=True)
    assert num_thought([*b"Hm", EOS_ID, *b".", *END, *b"Yes", EOS_ID], form, 1) == 4
    assert num_thought(list(b"Hm. END of it</think>Yes"), form, 1, "END") == len("Hm. END")
