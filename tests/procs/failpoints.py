"""Arming failpoints (common/failpoint.py) of a deployment, and the proof that each armed one was reached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.procs.waiting import wait_until

HIT_S = 30.0


class Failpoints:
    """The folder that a deployment was started with as `failpoint_dir`. Owned by the test."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._armed: set[str] = set()

    def arm(self, name: str, action: str = "wait", *, is_optional: bool = False) -> None:
        """Let the next process that comes to `name` (`name@process` for one of several) do `action`. A test whose fault
        did not fire fails, at `clear`, unless it is optional: a gate that is only there to hold what comes too early.
        """
        self.disarm(name)
        draft = self.folder / f"{name}.draft"
        draft.write_text(action)
        draft.rename(self.folder / f"{name}.arm")
        if not is_optional:
            self._armed.add(name)

    def wait_hit(self, name: str, timeout_s: float = HIT_S) -> int:
        """Wait until a process is at `name`; its process id."""
        hit = self.folder / f"{name}.hit"
        wait_until(hit.exists, f"failpoint {name} reached", timeout_s)
        self._armed.discard(name)
        return int(hit.read_text())

    def wait_hit_unless(self, name: str, is_over: Callable[[], bool], timeout_s: float = HIT_S) -> int:
        """As wait_hit; 0 where no process has come to `name` by the time that `is_over`."""

        def is_decided() -> bool:
            over = is_over()  # first: who was at the point before the end is seen
            return self.is_hit(name) or over

        wait_until(is_decided, f"failpoint {name} reached, or the operation's end", timeout_s)
        return self.wait_hit(name) if self.is_hit(name) else 0

    def is_hit(self, name: str) -> bool:
        """Whether a process has come to `name`."""
        return (self.folder / f"{name}.hit").exists()

    def release(self, name: str) -> None:
        """Let the process that waits at `name` go on."""
        (self.folder / f"{name}.release").touch()

    def disarm(self, name: str) -> None:
        """Nobody stops at `name` any more, and who does goes on."""
        (self.folder / f"{name}.arm").unlink(missing_ok=True)
        for suffix in ("hit", "release"):
            (self.folder / f"{name}.{suffix}").unlink(missing_ok=True)

    def forget(self) -> None:
        """Let all go on and disarm everything, whatever was reached."""
        for path in list(self.folder.iterdir()):
            path.unlink(missing_ok=True)
        self._armed.clear()

    def clear(self) -> None:
        """Let all go on and disarm everything. Fails the test where something that was armed was never reached."""
        missed = [name for name in self._armed if not (self.folder / f"{name}.hit").exists()]
        for path in list(self.folder.iterdir()):
            if path.suffix == ".arm":
                path.unlink(missing_ok=True)
            elif path.suffix == ".hit":  # who waits there must find the release; a later `arm` removes both
                path.with_suffix(".release").touch()
        self._armed.clear()
        assert not missed, f"never reached: {missed}"
