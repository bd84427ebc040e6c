"""Every command block of README and docs, typed into a shell in the order of its page, on a fresh deployment.

A page that starts no deployment of its own finds one running: what `make up` starts. The home, the run directory and
the working directory are new (`typed.py`); the demo model is the tiny one.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.markdown import ROOT, Block, blocks_of, commands, pages
from tests.procs.typed import Shell

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(400)]

PAGES = [page for page in pages() if commands(blocks_of(page))]
_STARTS = re.compile(r"\b(?:elasticmoe|make) up\b")


@pytest.fixture
def shell(model_folder: Callable[[str], Path]) -> Iterator[Shell]:
    made = Shell(model_folder("tiny-mixtral"))
    yield made
    made.discard()


def what_make_up_starts() -> list[str]:
    """The command line of `make up`, without the installation."""
    told = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", "install", "up"], cwd=ROOT, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    program, *arguments = shlex.split(told.stdout)
    assert Path(program).name == "elasticmoe", told.stdout
    return [str(Path(sys.executable).with_name("elasticmoe")), *arguments]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_works_on_a_fresh_deployment(shell: Shell, page: Path) -> None:
    blocks = commands(blocks_of(page))
    if not any(_STARTS.search(block.script) for block in blocks):
        shell.start(what_make_up_starts())
    shell.type(blocks)
    shell.leave()


def test_a_command_that_fails_is_told_with_its_place(shell: Shell) -> None:
    page = ROOT / "README.md"
    blocks = [
        Block(page, 1, "sh", "true\n"),
        Block(page, 7, "sh", "elasticmoe status\n"),
        Block(page, 9, "sh", "true\n"),
    ]
    with pytest.raises(AssertionError, match=r"README\.md:7.*exit status 1"):
        shell.type(blocks)
