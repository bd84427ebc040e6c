"""The threads of this process that compute in the native kernels (ADR 44)."""

from __future__ import annotations

from elasticmoe.common.telemetry import get_logger
from elasticmoe.common.wording import counted
from elasticmoe.native import kernels

log = get_logger("rank")


class KernelThreads:
    """How many there are. What cannot be started is done without."""

    def __init__(self, count: int, *, are_shared: bool) -> None:
        """`are_shared`: their number is a part of the machine's cores, and changes."""
        self._are_shared = are_shared
        self._wanted = 0
        self.use(count)

    def use(self, count: int) -> None:
        """Let so many compute from now on, between two steps."""
        if count == self._wanted:
            return
        self._wanted = count
        try:
            kernels.use_threads(count)
        except (RuntimeError, MemoryError) as error:
            log.warning("threads cannot be started", wanted=count, there_are=kernels.threads(), because=str(error))
        log.info("computes", threads=kernels.threads(), by=kernels.instruction_sets()[0])

    @property
    def words(self) -> str:
        """The instruction set of the kernels, and how many threads they have, or that this changes."""
        threads = "shared cores" if self._are_shared else counted(kernels.threads(), "thread")
        return f"{kernels.instruction_sets()[0]}, {threads}"
