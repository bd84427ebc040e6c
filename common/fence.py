"""Fencing: the highest epoch that a resource has seen, kept on disk, and the refusal of lower ones.

The store coordinates, the resource fences: whoever holds memory or computes refuses a command whose sender acts under
a superseded epoch, also after its own restart.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elasticmoe.common.protocol.errors import Fenced, Unavailable

LOCK_SECONDS_MAX = 1.0  # a process that was stopped with the lock holds up nobody for longer
_LOCK_AGAIN_S = 0.01


class Fence:
    """One resource's fence, in a file of `state_dir`. Owned by one thread of a process. All raise Unavailable where
    the file cannot be read, also the constructor: nothing is obeyed then.

    Two processes may share the file for a while (a rank and its replacement, two scalers of one host): it is read at
    each check, and it never falls. `epoch`: the highest that has been read or written.
    """

    def __init__(self, state_dir: Path, name: str) -> None:
        self._path = state_dir / f"fence-{name}"
        self.num_refused = 0
        self.epoch = self._read()

    def refresh(self) -> int:
        """The highest epoch that this process or another one with this file has seen."""
        self.epoch = max(self.epoch, self._read())
        return self.epoch

    def check(self, epoch: int, sender: str) -> None:
        """Let a command pass, or raise Fenced. A higher epoch is made durable before the command takes effect.

        Raises Unavailable `storage_full` where it cannot be; the command must not be carried out then.
        """
        if epoch > self.refresh():
            with self._locked(epoch):
                if epoch > self.refresh():
                    self._write(epoch)
                    self.epoch = epoch
        if epoch < self.epoch:
            self.num_refused += 1
            raise Fenced(f"{sender} acts under epoch {epoch}; epoch {self.epoch} has been seen")

    def claim(self, epoch: int, sender: str) -> None:
        """Make `epoch` durable as nobody's but the sender's. Raises Fenced unless it is above all that have been seen:
        a store that was emptied may give one out again. Raises Unavailable as `check` does."""
        with self._locked(epoch):
            if epoch <= self.refresh():
                self.num_refused += 1
                raise Fenced(f"{sender} was given epoch {epoch}; epoch {self.epoch} has been seen")
            self._write(epoch)
            self.epoch = epoch

    def note(self, epoch: int, *, wait_s: float | None = None) -> None:
        """Make `epoch` durable where it is above all that have been seen. Raises Unavailable as `check` does, after
        `wait_s` for another process, else LOCK_SECONDS_MAX."""
        if epoch <= self.epoch:
            return
        with self._locked(epoch, wait_s):
            if epoch > self.refresh():
                self._write(epoch)
                self.epoch = epoch

    def heed(self, epoch: int) -> None:
        """A question was asked under `epoch`: commands of earlier ones are refused from now on. A question is answered
        whatever its epoch, and at once: where that cannot be made durable now, the first command under it raises."""
        with suppress(Unavailable):
            self.note(epoch, wait_s=0.0)

    def _read(self) -> int:
        try:
            return int(self._path.read_text())
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise Unavailable(f"{self._path.name} cannot be read: {error.strerror}") from None
        except ValueError:
            raise Unavailable(f"{self._path.name} cannot be read: it holds no whole number") from None

    @contextmanager
    def _locked(self, epoch: int, wait_s: float | None = None) -> Iterator[None]:
        """One process at a time compares and writes. Blocks for `wait_s` at most, else LOCK_SECONDS_MAX."""
        wait_s = LOCK_SECONDS_MAX if wait_s is None else wait_s
        deadline = time.monotonic() + wait_s
        try:
            descriptor = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Unavailable(f"epoch {epoch} cannot be made durable: {error.strerror}", code="storage_full") from None
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        text = f"its file was locked by another process for {wait_s:g} s"
                        raise Unavailable(f"epoch {epoch} cannot be made durable: {text}") from None
                    time.sleep(_LOCK_AGAIN_S)
            yield
        finally:
            os.close(descriptor)

    def _write(self, epoch: int) -> None:
        temporary = self._path.with_suffix(".new")
        try:
            with open(temporary, "w") as file:
                file.write(str(epoch))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except OSError as error:
            raise Unavailable(f"epoch {epoch} cannot be made durable: {error.strerror}", code="storage_full") from None
