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

from elasticmoe.common.config import keep_nccl_from_registering
from elasticmoe.common.telemetry import get_logger

log = get_logger("exchange")

MEET_S: Final = 60.0  # the longest that making a group waits for its members
MAKE_S: Final = 10.0  # the longest that torch may take for it once they are there
CONNECT_S: Final = 60.0  # the longest that a first collective may take, where members connect by it
COLLECT_S: Final = 3_600.0  # for collectives that `abort` ends: longer than any step
LEAST_S: Final = 0.001  # of a collective's own deadline: torch takes 0 for none
CLOSE_S: Final = 20.0  # the longest that a rank's end waits for groups to end
LOOK_S: Final = 0.005  # between two looks whether they are
LOOPBACK: Final = "127.0.0.1"


class Generations(Protocol):
    """What says which generation is in force: the rank's bus, of which this is used. Any thread may ask."""

    @property
    def slot(self) -> int:
        """The rank's own."""

    def staged(self) -> tuple[int, int, int]:
        """Generation, members and epoch of what comes next; zeros for nothing."""

    def membership(self) -> tuple[int, int, bool, int]:
        """Generation, members, whether it runs, and epoch of what is in force."""


class TorchGroup(Protocol):
    """A process group of torch's, of which this is used."""

    def alltoall_base(
        self,
        came: torch.Tensor,
        sent: torch.Tensor,
        came_sizes: list[int],
        sent_sizes: list[int],
        timeout: timedelta,
        /,
    ) -> dist.Work:
        """Send parts of rows of `sent` to the members by rank; `came` gets theirs."""

    def abort(self) -> None:
        """Give up all that is under way, where it can be. Nobody may use the group any more."""


class Group:
    """The members of a generation: one collective at a time. `ends_by_itself`: a collective of it does not end by
    `abort`, but by its own deadline or when a peer closes its connections. `connects_on`: the device of a group whose
    members are not connected before their first collective (`connect`); None: these are.

    The group of torch's, and what is under way in it, are held here alone: whoever lets go of them last waits for
    torch's threads, which may wait for peers. So a traceback that keeps a step's frames must not hold them. `end`: what
    gives it up, where that is not its `abort`.
    """

    def __init__(
        self,
        group: TorchGroup,
        ends_by_itself: bool,
        connects_on: torch.device | None = None,
        end: Callable[[TorchGroup], None] = lambda group: group.abort(),
    ) -> None:
        self._group: TorchGroup | None = group
        self._ends_by_itself = ends_by_itself
        self._connects_on = connects_on
        self._end = end
        self._work: dist.Work | None = None

    def connect(self, num_members: int, is_wanted: Callable[[], bool]) -> None:
        """Connect the members, which all call this before anything else, by a collective of one element for each, on a
        stream of its own: what the rank computes meanwhile does not wait for it. Blocks for the others. Raises
        TimeoutError after CONNECT_S, or when the group is not wanted any more, and what torch raises: the group is
        given up then."""
        if self._connects_on is None or num_members == 1:
            return
        try:
            torch.accelerator.set_device_index(self._connects_on)  # a thread's own: else torch uses the first one too
            streams = torch.get_device_module(self._connects_on)
            with streams.stream(streams.Stream()):
                self._connect(self._connects_on, num_members, is_wanted)
        except BaseException:
            self.abort()
            raise

    def _connect(self, device: torch.device, num_members: int, is_wanted: Callable[[], bool]) -> None:
        sizes, sent = [1] * num_members, torch.zeros(num_members, device=device)
        came, deadline = torch.empty_like(sent), time.monotonic() + CONNECT_S
        self.start(came, sent, sizes, sizes, CONNECT_S)
        while not self.is_done():
            if not is_wanted():
                raise TimeoutError(f"{num_members} members have not connected, and are not to any more")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{num_members} members have not connected in {CONNECT_S:g} s")
            time.sleep(LOOK_S)
        self.finish()

    def start(
        self, came: torch.Tensor, sent: torch.Tensor, came_sizes: list[int], sent_sizes: list[int], within_s: float
    ) -> None:
        """Begin to send parts of rows of `sent` to the members by rank; `came` gets theirs. `within_s`: the caller
        waits no longer. Raises RuntimeError, as where a peer has gone."""
        assert self._group is not None
        timeout = timedelta(seconds=max(within_s, LEAST_S) if self._ends_by_itself else COLLECT_S)
        self._work = self._group.alltoall_base(came, sent, came_sizes, sent_sizes, timeout)

    def is_done(self) -> bool:
        """Whether what was started has ended, well or not."""
        assert self._work is not None
        return self._work.is_completed()

    def finish(self) -> None:
        """After is_done. Raises RuntimeError where it has failed, as when a peer has gone."""
        assert self._work is not None
        self._work.wait()
        self._work = None

    def abort(self) -> None:
        """Give up all that is under way, and the group. Blocks until torch's threads have ended: for a group that ends
        by itself, until its peers have given it up too, or until the deadline of what was under way."""
        group, self._group, self._work = self._group, None, None
        if group is not None:
            with suppress(RuntimeError):  # a peer that is gone already
                self._end(group)


MakeGroup = Callable[[torch.device, Store, int, int], Group]
"""Of the tensors' device, the members' store, the own rank, and how many there are."""


def _gloo(device: torch.device, store: Store, rank: int, size: int) -> Group:
    del device  # CPUs have one; members are connected when this returns
    kind: Any = dist.ProcessGroupGloo  # torch's stubs know little of groups
    options = kind._Options()
    options._devices = [kind.create_device(hostname=LOOPBACK)]
    options._timeout = timedelta(seconds=MAKE_S)
    options._threads = 1
    return Group(kind(store, rank, size, options), ends_by_itself=True)  # gloo's abort does nothing


def _nccl(device: torch.device, store: Store, rank: int, size: int) -> Group:
    keep_nccl_from_registering()
    kind: Any = dist.ProcessGroupNCCL
    options = kind.Options()
    options._timeout = timedelta(seconds=MAKE_S)
    return Group(_patient(kind(store, rank, size, options)), ends_by_itself=False, connects_on=device)


def _hccl(device: torch.device, store: Store, rank: int, size: int) -> Group:
    kind: Any = importlib.import_module("torch_npu._C._distributed_c10d").ProcessGroupHCCL  # there where its device is
    options = kind.Options()
    options.op_timeout = timedelta(seconds=MAKE_S)
    return Group(_patient(kind(store, rank, size, options)), ends_by_itself=False, connects_on=device, end=_end_hccl)


def _end_hccl(group: Any) -> None:
    """ProcessGroupHCCL of torch-npu 2.12 and 2.13 has an `abort` of its own that Python does not reach: theirs takes a
    reason, so that the one without is that of all of torch's groups, which does nothing. What does the same is bound by
    another name."""
    if hasattr(group, "abort_hccl_comm"):
        group.abort_hccl_comm("its generation is over")
    else:
        group.abort()


def _patient(group: Any) -> TorchGroup:
    """One that does not give up a collective by itself: its watchdog would end the process."""
    group._set_default_timeout(timedelta(seconds=COLLECT_S))
    made: TorchGroup = group
    return made


BY_DEVICE: Final[dict[str, MakeGroup]] = {"cpu": _gloo, "cuda": _nccl, "npu": _hccl}
"""By torch's types of devices."""


class _Making:
    """A group that is being made, or was. `make` is told whether it is still wanted, as often as it asks.

    Its thread makes the group and gives it up at the end, since both may wait for peers."""

    def __init__(self, make: Callable[[Callable[[], bool]], Group], name: str) -> None:
        self.group: Group | None = None
        self.error: Exception | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), name=name, daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[Callable[[], bool]], Group]) -> None:
        try:
            self.group = make(lambda: not self._is_over.is_set())
        except Exception as error:
            self.error = error.with_traceback(None)
            return
        self._is_over.wait()
        self.group.abort()

    def give_up(self) -> None:
        """Nobody uses the group any more. Never blocks. Idempotent."""
        self._is_over.set()

    def join(self, within_s: float) -> bool:
        """Wait until it has ended; whether it has."""
        self._thread.join(within_s)
        return not self._thread.is_alive()


class Groups:
    """One rank's. For one thread. `path`: of a file that all ranks of the host share and nobody else writes, made where
    it is missing; `name`: tells generations of one memory from those of another in it; `generations`: to be asked until
    `close` has returned; `device`: of the tensors."""

    def __init__(self, path: Path, name: str, generations: Generations, device: torch.device) -> None:
        self._path, self._name, self._generations, self._slot = path, name, generations, generations.slot
        self._make = partial(BY_DEVICE[device.type], device)
        self._made: dict[int, _Making] = {}
        self._ending: list[_Making] = []

    def prepare(self, generation: int, members: Sequence[int]) -> bool:
        """Begin to make the group of `members`, slots in ascending order with the own one among them, if that has not
        begun; whether all have come. One that failed is made no second time. Never blocks."""
        if generation not in self._made:
            make = partial(self._meet, generation, members)
            self._made[generation] = _Making(make, f"group-{generation}")
        making = self._made[generation]
        return making.group is not None

    def _meet(self, generation: int, members: Sequence[int], is_wanted: Callable[[], bool]) -> Group:
        """Wait for all members, and make the group with them, connected. Raises TimeoutError, and what torch raises."""

        def may_begin() -> bool:
            """Asked here, as the rank may not say it: its thread waits for the device as long as members connect there
            whose peer has died. What is staged, first: it may come into force in between."""
            known = self._generations
            return is_wanted() and generation in (known.staged()[0], known.membership()[0])

        store = PrefixStore(f"{self._name}/{generation}", FileStore(str(self._path), -1))
        store.set_timeout(timedelta(seconds=MAKE_S))
        store.set(f"here/{self._slot}", "")
        wanted, deadline = [f"here/{slot}" for slot in members], time.monotonic() + MEET_S
        while not store.check(wanted):
            if not may_begin():
                raise TimeoutError(f"generation {generation} is over")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the members of generation {generation} have not come in {MEET_S:g} s")
            time.sleep(LOOK_S)
        group = self._make(store, list(members).index(self._slot), len(members))
        group.connect(len(members), may_begin)
        return group

    def get(self, generation: int) -> Group | None:
        """The group, once it is made. Raises what making it raised."""
        making = self._made[generation]
        if making.error is not None:
            raise making.error
        return making.group

    def keep(self, generation: int) -> None:
        """Give up all of generations before this one. Never blocks."""
        for old in [each for each in self._made if each < generation]:
            log.info("group given up", generation=old)
            self._give_up(old)

    def close(self) -> None:
        """Give up all, and wait for CLOSE_S at the most until torch's threads have ended: none should outlive the rank.
        Idempotent."""
        for generation in list(self._made):
            self._give_up(generation)
        until = time.monotonic() + CLOSE_S
        self._ending = [each for each in self._ending if not each.join(max(0.0, until - time.monotonic()))]
        if self._ending:
            log.warning("groups still wait for their peers", groups=len(self._ending), limit_s=CLOSE_S)

    def _give_up(self, generation: int) -> None:
        making = self._made.pop(generation)
        making.give_up()
        self._ending = [each for each in self._ending if not each.join(0.0)] + [making]
