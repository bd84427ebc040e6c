"""Whom the launcher's children left behind: the ranks of a pool above all, which outlive it and serve on (ADR 16).

The kernel makes every process whose parent has ended a child of its nearest ancestor that asked for such (see
common/ties.py). So the launcher finds whatever its children started, though it knows nothing of it, and nothing
outlives it: it ends them when it stops, and they are tied to its life as its own children are.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

LINGER_S = 5.0  # one that has ended stays for so long at least: its pool reads how it ended from /proc
_TURN_S = 0.02
_KILL_S_MAX = 10.0


class Orphans:
    """Children of this process but those of `own`, whose process ids stay reserved until somebody else reaps them."""

    def __init__(self, own: Callable[[], Collection[int]]) -> None:
        self._own = own
        self.reap_at: float | None = None
        self._ended: set[int] = set()  # seen at the last `reap`

    def note_end(self) -> None:
        """Some child has ended: `reap` is due after LINGER_S. Only records, for a signal handler."""
        self.reap_at = self.reap_at or time.monotonic() + LINGER_S

    def reap(self) -> None:
        """Let go of those that had ended at the last call, LINGER_S ago or more. Does not block."""
        self._reap(self._ended)

    def living(self) -> set[int]:
        """Process ids. Those that have ended are let go of."""
        self._reap(None)
        return {pid for pid, _ in self._found()}

    def _reap(self, due: set[int] | None) -> None:
        """Of those that have ended, the ones that are `due`; None: all."""
        self.reap_at = None  # who ends from here on is noted, or seen
        ended = {pid for pid, state in self._found() if state == "Z"}
        self._ended = set() if due is None else ended - due
        for pid in ended - self._ended:
            os.waitpid(pid, os.WNOHANG)
        if self._ended:
            self.note_end()

    def end(self, grace_s: float, is_cut_short: Callable[[], bool]) -> int:
        """SIGTERM to all, SIGKILL after `grace_s` or when it is cut short, until none is left, also of those that they
        leave behind in turn. Blocks until then, at most _KILL_S_MAX longer. The number of those that were killed."""
        asked: set[int] = set()
        killed: set[int] = set()
        begun = time.monotonic()
        while time.monotonic() - begun < grace_s + _KILL_S_MAX:
            living = self.living()
            if not living:
                break
            is_late = time.monotonic() - begun >= grace_s or is_cut_short()
            # Nobody else reaps them, so a number is its process's still.
            for pid in living - (killed if is_late else asked):
                os.kill(pid, signal.SIGKILL if is_late else signal.SIGTERM)
            asked |= living
            killed |= living if is_late else set()
            time.sleep(_TURN_S)
        return len(killed)

    def _found(self) -> Iterator[tuple[int, str]]:
        """Process ids and states."""
        parent, own = os.getpid(), self._own()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in own:
                continue
            try:
                # The second field is the program's name in parentheses and may hold anything.
                state, ppid = (entry / "stat").read_bytes().rpartition(b")")[2].split(maxsplit=2)[:2]
            except OSError:
                continue  # it has just ended, or is somebody else's
            if int(ppid) == parent:
                yield int(entry.name), state.decode()
