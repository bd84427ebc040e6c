"""The scaler's lease in the store, renewed by a thread of its own: a store that hangs does not hold up the loop."""

from __future__ import annotations

import threading

from elasticmoe.common.fence import Fence
from elasticmoe.common.protocol.errors import Fenced, Unavailable, Unready
from elasticmoe.common.store import Store, Writer
from elasticmoe.common.telemetry import get_logger

log = get_logger("scaler")


class Lease:
    """Who may act as scaler. Made, asked and released by the loop's thread. `why_not`: the last `attempt` failed."""

    def __init__(self, store: Store, holder: str, lease_ms: int, fence: Fence) -> None:
        self._store = store
        self._holder = holder
        self._lease_ms = lease_ms
        self._fence = fence
        self.why_not: Unavailable = Unready("no scaler has the lease yet")
        self._full: Unavailable | None = None
        self._writer = Writer(holder, 0)
        self._lost = threading.Event()
        self._ended = threading.Event()
        self._waiting_for = ""
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Let a thread of the lease's own renew it from when there is one, until `release`."""
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def attempt(self) -> int | str:
        """Try once to get the lease: the fencing epoch, made durable on this host, or why not."""
        try:
            # Above all epochs that this host has seen, also when the store was wiped or rolled back; read anew, because
            # another scaler of this host may have had the lease while this one waited.
            got = self._store.acquire_lease(self._holder, self._lease_ms, self._fence.refresh())
            if isinstance(got, str):
                self.why_not, got = Unready(f"{got} holds the lease"), f"{got} holds it"
        except Unavailable as error:
            got, self.why_not = error.message, error
        if isinstance(got, int):
            got = self._remember(got)
        if isinstance(got, int):
            self._writer = Writer(self._holder, got)
            log.info("lease acquired", fence=got)
        elif got != self._waiting_for:
            self._waiting_for = got
            log.info("waiting for the lease", because=got)
        return got

    def _remember(self, fence: int) -> int | str:
        """Make the epoch durable on this host. Where the disk takes nothing the lease is given back, so that serving
        goes on without a scaler and another host's may have it: returns why."""
        try:
            self._fence.claim(fence, self._holder)
        except Fenced as error:
            why, self.why_not = error.message, Unready(error.message)
        except Unavailable as error:
            why, self.why_not = "the fencing epoch cannot be kept on this host's disk", error
        else:
            return fence
        try:
            self._store.release_lease(self._holder)
        except Unavailable:
            pass  # it expires by itself
        return why

    def check(self) -> None:
        """Raises Fenced when another scaler holds the lease. Does not block."""
        if self._lost.is_set():
            raise Fenced("another scaler holds the lease")

    def check_room(self) -> None:
        """Raises Unavailable `storage_full` while the lease cannot be renewed because the store takes no writes."""
        if (full := self._full) is not None:
            raise full

    def lose(self) -> None:
        """Another part has found that somebody else holds the lease. Any thread."""
        self._lost.set()

    def _keep(self) -> None:
        wait_s = self.turn()
        while wait_s is not None and not self._ended.wait(wait_s):
            wait_s = self.turn()

    def turn(self) -> float | None:
        """Renew the lease where there is one, at half time: the next turn is due after so many seconds. None: it
        is lost, and there is none. An outage ends no scaler: fencing keeps two from acting on the resources."""
        return None if self._writer.fence and not self.renew() else self._lease_ms / 2e3

    def renew(self) -> bool:
        """Renew once, as far as the store answers. False, and `check` raises from now on, when another scaler has been
        given a higher epoch: the store says so, or, where it was emptied, this host's disk."""
        try:
            if self._fence.refresh() > self._writer.fence or not self._store.renew_lease(self._writer, self._lease_ms):
                self._lost.set()
                return False
            self._full = None
        except Unavailable as error:
            self._full = error if error.code == "storage_full" else None
            log.warning("lease could not be renewed", because=error.message)
        return True

    def release(self) -> None:
        """Give the lease back. Waits for the thread, whose calls are bounded."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self._store.release_lease(self._holder)
        except Unavailable as error:
            log.warning("lease could not be released", because=error.message)
