"""The command blocks of the project's pages: what is told to be typed, and what a test cannot type.

A fence of the language `sh` (or `console`, whose commands follow a `$ `) is run, in the order of its page. The comment
`<!-- not run: WHY -->` on the line before a fence takes one out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMAND_LANGUAGES = ("sh", "console")
# The first words of what somebody would type: a fence without a language must not begin with one.
PROGRAMS = frozenset(
    [
        "elasticmoe",
        "make",
        "curl",
        "docker",
        "podman",
        "sudo",
        "systemctl",
        "git",
        "cd",
        "cp",
        "mkdir",
        "rm",
        "export",
        "pip",
        "python3",
        "cat",
    ]
)

_MADE = ("build", "dist")
_INSTALLED = "node_modules"
_FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})\s*([\w+-]*)\s*$")
_MARK = re.compile(r"^\s*<!--\s*not run:\s*(.+?)\s*-->\s*$")
_NEAR_MARK = re.compile(r"<!--\s*not[ -]?run", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """One fence. `line`: of its first line, from 1. `why_not`: why it is not run; empty for one that is."""

    page: Path
    line: int
    language: str
    text: str
    why_not: str = ""

    @property
    def place(self) -> str:
        """`docs/scaling.md:5`."""
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page.name}:{self.line}"

    @property
    def is_command(self) -> bool:
        """Whether it is told to be typed."""
        return self.language in COMMAND_LANGUAGES

    @property
    def script(self) -> str:
        """What a shell is given."""
        if self.language != "console":
            return self.text
        typed = [line.removeprefix("$ ") for line in self.text.splitlines() if line.startswith("$ ")]
        return "\n".join(typed) + "\n"


def pages() -> list[Path]:
    """All of the repository, however new they are; not those of what was installed or built."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in _MADE]
    found = (page for folder in folders for page in folder.rglob("*.md") if _INSTALLED not in page.parts)
    return sorted([*ROOT.glob("*.md"), *found])


def blocks_of(page: Path) -> list[Block]:
    """All fences of a page, in order. Raises ValueError for one that is not closed, and for a mark that marks
    nothing."""
    return parse(page, page.read_text(encoding="utf-8"))


def parse(page: Path, text: str) -> list[Block]:
    """The same for a page's text."""
    found: list[Block] = []
    mark, fence = "", None
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        match = _FENCE.match(line)
        if fence is not None:
            indent, ticks, language, begun = fence
            if match and not match[3] and match[2].startswith(ticks):
                found.append(Block(page, begun, language, "".join(lines), mark))
                mark, fence, lines = "", None, []
            else:
                lines.append(line.removeprefix(indent) + "\n")
            continue
        if match:
            fence = (match[1], match[2], match[3], number)
            continue
        if mark:
            raise ValueError(f"{page.name}:{number}: `not run` has to stand right before a fence")
        if (marked := _MARK.match(line)) is not None:
            mark = marked[1]
        elif _NEAR_MARK.search(line):
            raise ValueError(f"{page.name}:{number}: a mark is a line of its own: <!-- not run: WHY -->")
    if fence is not None or mark:
        raise ValueError(f"{page.name}: its last fence or mark is open")
    return found


def commands(blocks: Iterable[Block]) -> list[Block]:
    """Those that are run."""
    return [block for block in blocks if block.is_command and not block.why_not]
