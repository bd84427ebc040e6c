"""What a model thinks, told apart from what it says, however the text is cut."""

from __future__ import annotations

import random

import pytest

from elasticmoe.services.router.answer_parsers.parts import Reasoning, Text
from elasticmoe.services.router.answer_parsers.reasoning import FORMS, ReasoningParser, UnseparatedParser, marks_of

THINK = FORMS["think"]


def parsed(text: str, cuts: list[int], *, is_inside: bool) -> tuple[str, str]:
    parser = ReasoningParser(THINK, is_inside=is_inside)
    ends = [*cuts, len(text)]
    pieces = [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    thoughts = "".join(part.text for part in parts if isinstance(part, Reasoning))
    return thoughts, "".join(part.text for part in parts if isinstance(part, Text))


@pytest.mark.parametrize(
    ("text", "is_inside", "thought", "said"),
    [
        ("<think>\nLet me <b> see.\n\nYes. \n</think>\n\nIt is so.\n", False, "Let me <b> see.\n\nYes.", "It is so.\n"),
        ("\n <think>x</think>y", False, "x", "y"),
        ("\nhm < 3\n</think>\n\nIt is", True, "hm < 3", "It is"),
        ("<think>\n\n</think>\n\nAt once.", False, "", "At once."),
        ("</think>At once.", True, "", "At once."),
        ("At once. <think>no</think>", False, "", "At once. <think>no</think>"),
        ("  At once.", False, "", "  At once."),
        ("a</think>b</think>c", True, "a", "b</think>c"),
        ("a</think>\n\n    return x\n", True, "a", "    return x\n"),
        ("a</think> b", True, "a", "b"),
        ("a</think> \n \n", True, "a", ""),
        ("<think>cut off </thi", False, "cut off </thi", ""),
        ("still thinking ", True, "still thinking", ""),
        ("<thin", False, "", "<thin"),
        ("", False, "", ""),
        ("", True, "", ""),
    ],
)
def test_thoughts_and_text(text: str, is_inside: bool, thought: str, said: str) -> None:
    assert parsed(text, [], is_inside=is_inside) == (thought, said)
    assert parsed(text, list(range(len(text))), is_inside=is_inside) == (thought, said)
    rng = random.Random(text)
    for _ in range(30 if len(text) > 1 else 0):
        cuts = sorted(rng.sample(range(len(text)), rng.randrange(1, min(10, len(text)))))
        assert parsed(text, cuts, is_inside=is_inside) == (thought, said), cuts


@pytest.mark.parametrize(
    ("text", "is_inside", "thought"),
    [
        (" <think>\nx <tool_call>\n</think>\n\ny", False, " <think>\nx <tool_call>\n</think>"),
        ("x </thi</think> y", True, "x </thi</think>"),
        ("At once. <think>no</think>", False, ""),
        ("still <th", True, "still <th"),
        ("<thin", False, ""),
        ("", True, ""),
    ],
)
def test_unseparated_all_of_the_text_is_told_as_it_is(text: str, is_inside: bool, thought: str) -> None:
    for step in (1, 2, 3, 7, 99):
        parser = UnseparatedParser(THINK, is_inside=is_inside)
        parts = [part for at in range(0, len(text), step) for part in parser.feed(text[at : at + step])]
        parts += parser.finish()
        assert "".join(part.text for part in parts) == text
        assert "".join(part.text for part in parts if isinstance(part, Reasoning)) == thought


def test_what_is_certain_is_not_held_back() -> None:
    parser = ReasoningParser(THINK, is_inside=False)
    assert parser.feed("<think>\nFirst") == [Reasoning("First")]
    assert parser.feed(" then") == [Reasoning(" then")]
    assert parser.feed("</think>\n\n") == []
    assert parser.feed("So") == [Text("So")]
    assert parser.feed("</think>") == [Text("</think>")]


@pytest.mark.parametrize(
    ("setting", "template", "name"),
    [
        ("auto", "{{ content.split('</think>')[-1] }}", "think"),
        ("auto", "[THINK]{{ m.thinking }}[/THINK]", "mistral"),
        ("auto", "{{ messages }}", None),
        ("none", "</think>", None),
        ("think", "", "think"),
    ],
)
def test_the_marks(setting: str, template: str, name: str | None) -> None:
    assert marks_of(setting, template) == (FORMS[name] if name else None)
