"""Pages lead somewhere, say what to type, and mark what is not run and why. Whether the commands work is tested by
running them; this looks at the texts."""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from elasticmoe.cli.main import make_parser

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [ROOT / "README.md", *DOCS.rglob("*.md"), ROOT / "deploy" / "README.md", *(ROOT / "benchmarks").glob("*.md")]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")
FOR_DEVELOPERS = {"architecture.md", "glossary.md", "oracle.md", "promises.md", "robustness.md"}
FIRST_SCREEN = 30  # lines
OTHERS = {"useradd", "systemctl", "journalctl", "rm", "git", "-C"}  # commands to which the name is an argument


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target, anchor in LINK.findall(text):
        if target.startswith(("http://", "https://")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{name(page)}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor[1:] in anchors(file), f"{name(page)}: {target}{anchor}"


def user_pages() -> list[Path]:
    made = {DOCS / "reference" / "errors.md"}
    return [
        page
        for page in sorted(DOCS.rglob("*.md"))
        if "adr" not in page.parts and page.name not in FOR_DEVELOPERS and page not in made
    ]


@pytest.mark.parametrize("page", user_pages(), ids=name)
def test_the_first_screen_tells_what_to_type(page: Path) -> None:
    assert "```sh" in page.read_text().splitlines()[:FIRST_SCREEN], name(page)


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    found = {(DOCS / target).resolve() for target, _ in LINK.findall(index)}
    missing = {page for page in DOCS.rglob("*.md") if "adr" not in page.parts} - found - {DOCS / "README.md"}
    assert missing == set()
    users, developers = index.split("## To work on it")
    assert not any(f"({page})" in users for page in FOR_DEVELOPERS)
    assert all(f"({page})" in developers for page in FOR_DEVELOPERS)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_in_pages_exist(page: Path) -> None:
    """Every `elasticmoe` command in a block is one that the parser takes, also in blocks that are not run."""
    parser = make_parser()
    for language, block in FENCE.findall(page.read_text()):
        if language != "sh":
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for words in commands_in(line):
                assert is_taken(parser, words), f"{name(page)}: {line}"


def is_taken(parser: argparse.ArgumentParser, words: list[str]) -> bool:
    try:
        parser.parse_args(words)
    except SystemExit as end:
        return end.code == 0  # --help
    return True


def commands_in(line: str) -> list[list[str]]:
    """The arguments of each `elasticmoe` in a line; what the shell would put in stands for itself."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # a text over several lines
        return []
    found: list[list[str]] = []
    for is_break, group in itertools.groupby(words, lambda word: set(word) <= set("|&;()<>")):
        simple = list(group)
        ours = (n for n, word in enumerate(simple) if word == "elasticmoe" or word.endswith("bin/elasticmoe"))
        at = next((n for n in ours if not n or simple[n - 1] != "-u"), None)  # -u: the user's name
        if not is_break and at is not None and not OTHERS & set(simple[:at]):
            found.append(simple[at + 1 :])
    return found


def test_every_reason_for_not_running_says_something() -> None:
    for page in PAGES:
        reasons = re.findall(r"<!-- not run: ?(.*?) ?-->\n(.*)", page.read_text())
        assert all(len(reason) > 10 and next_line == "```sh" for reason, next_line in reasons), name(page)


def test_the_picture_is_a_small_picture_of_its_own() -> None:
    path = DOCS / "picture.svg"
    assert path.stat().st_size < 64 * 1024
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    links = {value for element in root.iter() for key, value in element.attrib.items() if key.endswith("href")}
    assert links
    assert all(link.startswith("#") for link in links)
    assert not any(element.tag.endswith(("script", "image", "foreignObject")) for element in root.iter())
