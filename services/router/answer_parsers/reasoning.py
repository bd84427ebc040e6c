"""What a model thinks before it answers, told apart from the answer: `<think>…</think>`, at the answer's beginning.

A chat template may have written the opening mark already, as the prompt's end; then the answer begins inside. Line ends
and spaces around the marks belong to neither side, but for what an answer's first line is indented by.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from elasticmoe.services.router.answer_parsers.parts import Reasoning, Text


class Marks(NamedTuple):
    """Around the thinking."""

    open: str
    close: str


FORMS = {"think": Marks("<think>", "</think>"), "mistral": Marks("[THINK]", "[/THINK]")}


def marks_of(name: str, template: str) -> Marks | None:
    """Those of FORMS of that name; `auto`: by the chat template's text, None where it has none; `none`: None."""
    if name == "auto":
        return next((marks for marks in FORMS.values() if marks.close in template), None)
    return FORMS.get(name)


class ThinkingParser(ABC):
    """Of one answer. `is_inside`: the prompt ended with the opening mark. `_held`: the end of what was read."""

    def __init__(self, marks: Marks, *, is_inside: bool) -> None:
        self._marks = marks
        self._held = ""
        self._num_read = 0  # characters
        self.num_thought = 0  # of these, before the closing mark, once that has come
        self._is_inside = is_inside
        self._is_at_start = not is_inside  # nothing but spaces so far

    def feed(self, text: str) -> list[Reasoning | Text]:
        """What `text` lets out."""
        self._held += text
        self._num_read += len(text)
        return self._read(is_last=False)

    def finish(self) -> list[Reasoning | Text]:
        """What is still held, at the end of the answer."""
        return self._read(is_last=True)

    @property
    def is_thinking(self) -> bool:
        """The opening mark has come, and the closing one has not."""
        return self._is_inside

    @abstractmethod
    def _read(self, *, is_last: bool) -> list[Reasoning | Text]:
        """Both."""

    def _closed(self) -> int:
        """Where the closing mark begins in `_held`; less than 0 where it has none."""
        at = self._held.find(self._marks.close)
        if at >= 0:
            self.num_thought = self._num_read - len(self._held) + at
        return at


class ReasoningParser(ThinkingParser):
    """Tells the thinking without its marks."""

    def __init__(self, marks: Marks, *, is_inside: bool) -> None:
        super().__init__(marks, is_inside=is_inside)
        self._lead: list[str] = []  # spaces at the answer's beginning: whether the opening mark follows is not known
        self._spaces: list[str] = []  # at the end of what is thought: whether more follows is not known
        self._is_after_mark = is_inside  # spaces that follow are left out

    def _read(self, *, is_last: bool) -> list[Reasoning | Text]:
        parts: list[Reasoning | Text] = []
        if self._is_at_start and not self._begin(is_last=is_last):
            return parts
        if self._is_inside:
            at = self._closed()
            end = at if at >= 0 else len(self._held) - (0 if is_last else _partial(self._held, self._marks.close))
            self._think(self._held[:end], parts)
            self._held = self._held[end:]
            if at < 0:
                return parts
            self._held = self._held[len(self._marks.close) :]
            self._spaces, self._is_inside, self._is_after_mark = [], False, True
        if self._is_after_mark:
            said = self._held.lstrip()
            if not said:
                return parts
            _, line_end, indent = self._held[: len(self._held) - len(said)].rpartition("\n")
            self._held, self._is_after_mark = (indent if line_end else "") + said, False
        said, self._held = self._held, ""
        if said:
            parts.append(Text(said))
        return parts

    def _begin(self, *, is_last: bool) -> bool:
        """Whether it is known if the answer begins with thinking."""
        begun = self._held.lstrip()
        self._lead.append(self._held[: len(self._held) - len(begun)])
        self._held = begun
        if begun.startswith(self._marks.open):
            self._held = begun[len(self._marks.open) :]
            self._is_inside = self._is_after_mark = True
        elif not is_last and self._marks.open.startswith(begun):
            return False
        else:
            self._held = "".join(self._lead) + begun
        self._lead = []
        self._is_at_start = False
        return True

    def _think(self, text: str, parts: list[Reasoning | Text]) -> None:
        if self._is_after_mark:
            text = text.lstrip()
        kept = text.rstrip()
        if kept:
            self._is_after_mark = False
            parts.append(Reasoning("".join(self._spaces) + kept))
            self._spaces = []
        self._spaces.append(text[len(kept) :])


class UnseparatedParser(ThinkingParser):
    """For a client that wants the thinking in the text: Reasoning is what stands before the answer, as it is written,
    marks and all, in which no calls are looked for."""

    def _read(self, *, is_last: bool) -> list[Reasoning | Text]:
        parts: list[Reasoning | Text] = []
        if self._is_at_start:
            begun = self._held.lstrip()
            if not begun.startswith(self._marks.open) and self._marks.open.startswith(begun) and not is_last:
                return parts
            self._is_at_start, self._is_inside = False, begun.startswith(self._marks.open)
        if self._is_inside:
            at = self._closed()
            end = len(self._held) - (0 if is_last else _partial(self._held, self._marks.close))
            end = at + len(self._marks.close) if at >= 0 else end
            if end:
                parts.append(Reasoning(self._held[:end]))
            self._held, self._is_inside = self._held[end:], at < 0
            if self._is_inside:
                return parts
        if self._held:
            parts.append(Text(self._held))
            self._held = ""
        return parts


def _partial(text: str, mark: str) -> int:
    """Characters at the end of `text` that may be the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
