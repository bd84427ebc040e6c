"""Groups of torch.distributed for the members of a generation: made beside the steps of the one before it, given up
with their generation.

A group is what its members make together, each at its own time: whoever makes it waits until all have come. So a thread
does, and the rank asks whether it is done. Members find one another in a file of the deployment's, by the generation.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store

from elasticmoe.common.telemetry import get_logger

log = get_logger("exchange")

MEET_S: Final = 60.0  # the longest that making a group waits for its members
MAKE_S: Final = 10.0  # the longest that torch may take for it once they are there
COLLECT_S: Final = 3_600.0  # the longest that torch waits in a collective: longer than any step, which ends it earlier
LOOK_S: Final = 0.005  # between two looks whether they are
LOOPBACK: Final = "127.0.0.1"


class Group(Protocol):
    """A process group, of which this is used."""

    def alltoall_base(
        self, came: torch.Tensor, sent: torch.Tensor, came_sizes: list[int], sent_sizes: list[int], /
    ) -> dist.Work:
        """Send parts of rows of `sent` to the members by rank; `came` gets theirs."""

    def abort(self) -> None:
        """Give up all that is under way. Nobody may use the group any more."""


MakeGroup = Callable[[Store, int, int], Group]


def _gloo(store: Store, rank: int, size: int) -> Group:
    kind: Any = dist.ProcessGroupGloo  # torch's stubs know little of groups
    options = kind._Options()
    options._devices = [kind.create_device(hostname=LOOPBACK)]
    options._timeout = timedelta(seconds=MAKE_S)
    options._threads = 1
    return _patient(kind(store, rank, size, options))


def _nccl(store: Store, rank: int, size: int) -> Group:
    kind: Any = dist.ProcessGroupNCCL
    options = kind.Options()
    options._timeout = timedelta(seconds=MAKE_S)
    return _patient(kind(store, rank, size, options))


def _hccl(store: Store, rank: int, size: int) -> Group:
    kind: Any = importlib.import_module("torch_npu._C._distributed_c10d").ProcessGroupHCCL  # there where its device is
    options = kind.Options()
    options.op_timeout = timedelta(seconds=MAKE_S)
    return _patient(kind(store, rank, size, options))


def _patient(group: Any) -> Group:
    """One that does not give up a collective by itself."""
    group._set_default_timeout(timedelta(seconds=COLLECT_S))
    made: Group = group
    return made


BY_DEVICE: Final[dict[str, MakeGroup]] = {"cpu": _gloo, "cuda": _nccl, "npu": _hccl}
"""How groups are made for tensors of torch's types of devices."""


class _Making:
    """A group that is being made, or was. `make` is told whether it is still wanted, as often as it asks."""

    def __init__(self, make: Callable[[Callable[[], bool]], Group], name: str) -> None:
        self.group: Group | None = None
        self.error: Exception | None = None
        self._is_wanted = True
        self._thread = threading.Thread(target=self._run, args=(make,), name=name, daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[Callable[[], bool]], Group]) -> None:
        try:
            self.group = make(lambda: self._is_wanted)
        except Exception as error:
            self.error = error

    def close(self) -> None:
        """Blocks for as long as torch makes a group whose members have all come: no thread of it may outlive us."""
        self._is_wanted = False
        self._thread.join()
        if self.group is not None:
            with suppress(RuntimeError):  # a peer that is gone already
                self.group.abort()


class Groups:
    """One rank's. For one thread. `path`: of a file that all ranks of the host share and nobody else writes, made where
    it is missing; `name`: tells generations of one memory from those of another in it; `make`: see BY_DEVICE."""

    def __init__(self, path: Path, name: str, slot: int, make: MakeGroup) -> None:
        self._path, self._name, self._slot, self._make = path, name, slot, make
        self._made: dict[int, _Making] = {}

    def prepare(self, generation: int, members: Sequence[int]) -> bool:
        """Begin to make the group of `members`, slots in ascending order with the own one among them, if that has not
        begun; whether all have come. One that failed is made no second time. Never blocks."""
        if generation not in self._made:
            make = partial(self._meet, generation, members)
            self._made[generation] = _Making(make, f"group-{generation}")
        making = self._made[generation]
        return making.group is not None

    def _meet(self, generation: int, members: Sequence[int], is_wanted: Callable[[], bool]) -> Group:
        """Wait for all members, and make the group with them. Raises TimeoutError, and what torch raises."""
        store = PrefixStore(f"{self._name}/{generation}", FileStore(str(self._path), -1))
        store.set_timeout(timedelta(seconds=MAKE_S))
        store.set(f"here/{self._slot}", "")
        wanted, deadline = [f"here/{slot}" for slot in members], time.monotonic() + MEET_S
        while not store.check(wanted):
            if not is_wanted() or time.monotonic() > deadline:
                raise TimeoutError(f"the members of generation {generation} have not come in {MEET_S:g} s")
            time.sleep(LOOK_S)
        return self._make(store, list(members).index(self._slot), len(members))

    def get(self, generation: int) -> Group | None:
        """The group, once it is made. Raises what making it raised."""
        making = self._made[generation]
        if making.error is not None:
            raise making.error
        return making.group

    def keep(self, generation: int) -> None:
        """Give up all of generations before this one."""
        for old in [each for each in self._made if each < generation]:
            log.info("group given up", generation=old)
            self._made.pop(old).close()

    def close(self) -> None:
        """Give up all. Idempotent."""
        while self._made:
            self._made.popitem()[1].close()
