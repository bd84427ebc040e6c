"""What pages tell to be typed is marked so that `tests/procs/test_docs.py` types it; what it does not, says why."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cli.main import make_parser
from tests.markdown import PROGRAMS, ROOT, Block, blocks_of, commands, pages, parse

# Why a block may be left out: it needs what a test's machine does not have, or has no end.
REASONS = ("needs ", "serves until ", "runs until ", "runs for ", "changes the machine", "the whole test suite", "OP ")
WORDS_MIN = 2

ALL = [block for page in pages() for block in blocks_of(page)]
LEFT_OUT = [block for block in ALL if block.why_not]


def told(blocks: list[Block]) -> str:
    return "\n".join(f"{block.place}: {block.why_not}" for block in blocks)


def test_most_commands_are_run() -> None:
    print(told(LEFT_OUT))
    assert len(commands(ALL)) >= 2
    assert len(LEFT_OUT) <= len(commands(ALL)) + 2, f"more is left out than run:\n{told(LEFT_OUT)}"


def test_what_is_left_out_says_why() -> None:
    assert told([b for b in LEFT_OUT if not b.why_not.startswith(REASONS) or len(b.why_not.split()) < WORDS_MIN]) == ""
    assert told([b for b in LEFT_OUT if not b.is_command]) == "", "only commands are run at all"


def test_no_command_hides_in_a_fence_without_a_language() -> None:
    hidden = [
        block.place
        for block in ALL
        if not block.language
        and any(line.split()[:1] and line.split()[0] in PROGRAMS for line in block.text.splitlines())
    ]
    assert hidden == [], "write ```sh"
    shells = {"bash", "shell", "zsh", "shellsession", "sh-session", "terminal"}
    assert [block.place for block in ALL if block.language in shells] == [], "write ```sh"


def test_blocks_are_read_as_they_stand() -> None:
    page = ROOT / "README.md"
    text = (
        "# A\n\n```sh\none\n\ntwo # not a heading\n```\n\n1. x\n\n   ```sh\n   in a list\n   ```\n"
        "<!-- not run: needs a container engine -->\n```sh\ndocker\n```\n\n```\npicture\n```\n"
        "```console\n$ asked\nanswered\n$ again\n```\n````text\n```sh\n````\n"
    )
    found = parse(page, text)
    assert [block.line for block in found] == [3, 11, 15, 19, 22, 27]
    assert [block.script for block in commands(found)] == [
        "one\n\ntwo # not a heading\n",
        "in a list\n",
        "asked\nagain\n",
    ]
    assert [block.why_not for block in found if block.why_not] == ["needs a container engine"]
    assert found[0].place == "README.md:3"
    assert found[5].text == "```sh\n"


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nopen\n",
        "<!-- not run: nothing follows -->\n",
        "<!-- not run: too early -->\n\n```sh\nx\n```\n",
        "text <!-- not run: in a line --> \n```sh\nx\n```\n",
        "<!-- not run -->\n```sh\nx\n```\n",
    ],
)
def test_a_mark_that_marks_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"page\.md"):
        parse(Path("page.md"), text)


INLINE = [
    (page, match[1])
    for page in pages()
    if page.parent.name != "reference"  # made of the parser; its headings are commands without arguments
    for match in re.finditer(r"`(elasticmoe [^`\n]+)`", page.read_text(encoding="utf-8"))
    if not re.search(r"\[|…|\\\||[A-Z]{2,}|, ", match[1])  # a form to fill in, a list
]


def test_commands_in_sentences_are_ones_that_exist() -> None:
    assert len(INLINE) >= 5
    parser = make_parser()
    wrong = []
    for page, command in INLINE:
        words = shlex.split(command)[1:]
        try:
            parser.parse_args(words if len(words) > 1 else [*words, "--help"])  # one is a command's name
        except SystemExit as ended:
            if ended.code:
                wrong.append(f"{page.name}: {command}")
    assert wrong == []
