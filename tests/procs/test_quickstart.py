"""The quickstart as a newcomer follows it: a user without rights, in a fresh home, from the first block to the last.

All that is typed stands on the page, and on the one about removal that it ends with. Only the installation itself is
left out: the home's checkout has this one's environment. Where this is not root, the user is whoever runs the test,
with a folder for temporary files of the test's own.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.markdown import ROOT, Block, blocks_of
from tests.procs.another_user import OUT_OF_REACH, as_user, unused_uid
from tests.procs.typed import Shell

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(400)]

QUICKSTART, REMOVAL = ROOT / "docs/quickstart.md", ROOT / "docs/runbooks/uninstall.md"
_INSTALLS = re.compile(r"^make install .*\n", re.MULTILINE)
_SHARED = ("/tmp", "/var/tmp", "/dev/shm", "/run")


class Newcomer:
    """Somebody who has cloned the repository into a fresh home. `places`: folders, beside the home, in which the
    machine lets them write."""

    def __init__(self, model: Path) -> None:
        self.uid = unused_uid() if os.geteuid() == 0 else os.geteuid()
        become = as_user(self.uid, ()) if os.geteuid() == 0 else []
        if become is None:
            pytest.skip(OUT_OF_REACH)
        self.shell = Shell(model, uid=self.uid, become=become, work="elasticmoe")
        self.shell.environment["PATH"] = os.environ.get("PATH", os.defpath)  # the page says what to put there
        (self.shell.work / ".venv").symlink_to(sys.prefix)
        (self.shell.work / "build").mkdir()
        os.chown(self.shell.work / "build", self.uid, self.uid)
        if os.geteuid() == 0:  # no login manager has made a runtime folder: run directories are below /tmp
            del self.shell.environment["XDG_RUNTIME_DIR"]
            self.places = [Path(path) for path in _SHARED]
        else:
            temporary = self.shell.base / "tmp"
            temporary.mkdir()
            self.shell.environment["TMPDIR"] = str(temporary)
            self.places = [temporary, self.shell.runtime]

    def left(self) -> set[str]:
        """Everything of this user's that lies in the places, and in the home beside the checkout."""
        own = {str(path) for place in self.places for path in _walk(place) if _owner(path) == self.uid}
        own = {path for path in own if Path(path) != self.shell.base and self.shell.base not in Path(path).parents}
        inside = [place for place in self.places if self.shell.base in place.parents]
        own |= {str(path) for place in inside for path in place.rglob("*")}
        return own | {f"~/{path.relative_to(self.shell.home)}" for path in self.shell.home.rglob("*")}


def _walk(place: Path) -> Iterator[Path]:
    """All below it; what goes meanwhile, or is somebody else's alone, is passed over."""
    for folder, folders, files in os.walk(place):
        yield from (Path(folder, name) for name in (*folders, *files))


def _owner(path: Path) -> int | None:
    try:
        return path.lstat().st_uid
    except OSError:
        return None


def all_of(page: Path) -> list[Block]:
    """Its command blocks, also those that a test of pages leaves out, but for the installation."""
    blocks = [block for block in blocks_of(page) if block.is_command]
    return [replace(block, text=_INSTALLS.sub("", block.text), why_not="") for block in blocks]


@pytest.fixture
def newcomer(model_folder: Callable[[str], Path]) -> Iterator[Newcomer]:
    made = Newcomer(model_folder("tiny-mixtral"))
    yield made
    made.shell.discard()


def test_a_user_without_rights_follows_the_quickstart_and_nothing_is_left(newcomer: Newcomer) -> None:
    before = newcomer.left()
    checkout, cache = {"~/elasticmoe", "~/elasticmoe/.venv", "~/elasticmoe/build"}, "~/.cache/elasticmoe"
    assert {path for path in before if not path.startswith("~/.cache")} == checkout
    blocks = all_of(QUICKSTART)
    assert "make install" in QUICKSTART.read_text()
    assert [word for block in blocks for word in ("up", "chat", "doctor", "down") if f"elasticmoe {word}" in block.text]
    typed = newcomer.shell.type(blocks)
    assert '"object":"chat.completion"' in typed.replace(" ", "")
    newcomer.shell.wait_ended()
    left = newcomer.left()
    assert {path for path in left if not path.startswith(cache)} == {*checkout, "~/.cache"}
    assert {path.removeprefix(f"{cache}/").partition("/")[0] for path in left if path.startswith(f"{cache}/")} == {
        "models"
    }

    newcomer.shell.type([*all_of(QUICKSTART)[:1], *all_of(REMOVAL)])
    newcomer.shell.wait_ended()
    assert newcomer.left() == {"~/elasticmoe", "~/.cache"}
