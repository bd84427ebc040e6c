"""What pages tell to be typed is marked so that `tests/procs/test_docs.py` types it; what it does not, says why."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from elasticmoe.cli.main import make_parser
from tests.markdown import PROGRAMS, ROOT, Block, blocks_of, commands, pages, parse

# Why a block may be left out: it needs what a test's machine does not have, or has no end.
REASONS = ("needs ", "serves until ", "runs until ", "runs for ", "changes the machine", "the whole test suite", "OP ")
WORDS_MIN = 2

ALL = [block for page in pages() for block in blocks_of(page)]
LEFT_OUT = [block for block in ALL if block.why_not]


def told(blocks: list[Block]) -> str:
    return "\n".join(f"{block.place}: {block.why_not}" for block in blocks)


def indented(page: Path) -> list[str]:
    """Where commands stand in a block without a fence: indented lines that follow an empty one."""
    text, found, before = page.read_text(encoding="utf-8"), [], ""
    fenced = {
        number for block in blocks_of(page) for number in range(block.line, block.line + block.text.count("\n") + 2)
    }
    for number, line in enumerate(text.splitlines(), 1):
        first = line.split()[:1]
        if line.startswith("    ") and not before.strip() and number not in fenced and first and first[0] in PROGRAMS:
            found.append(f"{page.relative_to(ROOT)}:{number}")
        before = line
    return found


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
    assert [place for page in pages() for place in indented(page)] == [], "write ```sh"
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


LEFT_OUT_LINES = [
    (block.place, line.partition(" #")[0].strip())
    for block in LEFT_OUT
    for line in block.script.replace("\\\n", " ").splitlines()
]


def test_what_is_left_out_names_targets_and_flags_that_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    parser, wrong = make_parser(), []
    made = [
        (place, name) for place, line in LEFT_OUT_LINES for name in re.findall(r"\bmake (?:-C \S+ )?([\w-]+)", line)
    ]
    typed = [(place, line) for place, line in LEFT_OUT_LINES if line.startswith("elasticmoe ")]
    assert len(made) >= 8
    assert len(typed) >= 8
    wrong += [f"{place}: make {name}" for place, name in made if name not in targets]
    for place, line in typed:
        try:
            parser.parse_args(shlex.split(re.split(r" [|>&] ?", line)[0])[1:])
        except SystemExit as ended:
            if ended.code:
                wrong.append(f"{place}: {line}")
    assert wrong == []


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
