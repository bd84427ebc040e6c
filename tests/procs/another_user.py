"""Commands as another user: one without rights, whom nobody else is, and who still reaches this interpreter.

Where a folder on the way to it is root's alone, the command sees one in its place, in a mount namespace of its own,
that holds what it needs and nothing else: no right is left to it for that.
"""

from __future__ import annotations

import os
import pwd
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NOBODY = 65_534
OUT_OF_REACH = "only root can become another user, with setpriv, and show it an interpreter in a folder of root's"

_UIDS = (54_321, 60_000)
_STAGE = "/mnt"  # in the namespace, while it is made


def unused_uid() -> int:
    """A user that nobody is; two tests at a time hardly get the same one."""
    known = {entry.pw_uid for entry in pwd.getpwall()}
    return random.choice([uid for uid in range(*_UIDS) if uid not in known])


def as_user(uid: int, command: Sequence[str]) -> list[str] | None:
    """The command line that runs `command` as `uid`, without groups; None where this interpreter and the checkout
    cannot be brought into its reach."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return None
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--bounding-set=-all"]
    for prefix in (become, ["unshare", "--mount", "sh", "-euc", f'{_shown()}exec "$@"', "sh", *become]):
        try:
            if _is_in_reach(prefix):
                return [*prefix, *command]
        except FileNotFoundError:
            continue
    return None


def _is_in_reach(prefix: Sequence[str]) -> bool:
    says = [
        *prefix,
        sys.executable,
        "-c",
        "import elasticmoe.native.bus, pytest, sys, tests, torch; print(sys.version)",
    ]
    told = subprocess.run(says, cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip() == sys.version


def _shown() -> str:
    """What a shell in a mount namespace of its own does, so that all that is needed can be reached by everybody."""
    needed = {ROOT.resolve(), *(Path(path).resolve() for path in (sys.prefix, sys.base_prefix))}
    hidden: dict[Path, list[Path]] = {}
    for path in sorted(needed):
        first = next((folder for folder in (*reversed(path.parents), path) if not folder.stat().st_mode & 0o001), None)
        if first is not None and first != path:
            hidden.setdefault(first, []).append(path)
    stage = f"mount -t tmpfs -o mode=755 tmpfs {_STAGE}; " if hidden else ""
    show = ""
    for number, (folder, paths) in enumerate(hidden.items()):
        show += f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(folder))}; "
        for index, path in enumerate(paths):
            staged, place = f"{_STAGE}/{number}-{index}", shlex.quote(str(path))
            stage += f"mkdir {staged}; mount --bind {place} {staged}; "
            show += f"mkdir -p {place}; mount --bind {staged} {place}; "
    # The working directory may be in one of them: it is entered anew.
    return f'umask 022; {stage}{show}cd "$PWD"; ' + (f"umount --recursive --lazy {_STAGE}; " if hidden else "")
