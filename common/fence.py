"""Fencing: the highest epoch that a resource has seen, kept on disk, and the refusal of lower ones.

The store coordinates, the resource fences: whoever holds memory or computes refuses a command whose sender acts under
a superseded epoch, also after its own restart.
"""

from __future__ import annotations

import os
from pathlib import Path

from common.protocol.errors import Fenced, Unavailable


class Fence:
    """One resource's fence, in a file of `state_dir`. Owned by the resource's own loop thread."""

    def __init__(self, state_dir: Path, name: str) -> None:
        self._path = state_dir / f"fence-{name}"
        self.num_refused = 0
        self.epoch = int(self._path.read_text()) if self._path.is_file() else 0

    def check(self, epoch: int, sender: str) -> None:
        """Let a command pass, or raise Fenced. A higher epoch is made durable before the command takes effect.

        Raises Unavailable `storage_full` where it cannot be; the command must not be carried out then.
        """
        if epoch < self.epoch:
            self.num_refused += 1
            raise Fenced(f"{sender} acts under epoch {epoch}; epoch {self.epoch} has been seen")
        if epoch > self.epoch:
            self._write(epoch)
            self.epoch = epoch

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
