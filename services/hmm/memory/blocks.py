"""Copies of KV blocks between devices, for sequences that move: in threads, fenced by the two ranks' incarnations.

Where replicas have several ranks, a block is copied from each of them to the one of the same tp index.

A copy that ends late would overwrite what the target has written since it took the sequence over. So copies from one
slot to another run one after the other, as they were asked for, and none is done twice: each has a number. And none
begins or goes on after the time until which the target keeps its blocks free.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from elasticmoe.common.clock import SYSTEM_CLOCK, Clock
from elasticmoe.common.devices.base import Device
from elasticmoe.common.model_spec import KvGeometry
from elasticmoe.common.protocol.errors import Conflict, ElasticMoEError, InvalidRequest, Overloaded
from elasticmoe.common.protocol.hmm import CopyBlocks
from elasticmoe.services.hmm.background import Background, Then
from elasticmoe.services.hmm.memory.memory import DeviceMemory
from elasticmoe.services.hmm.sessions.attachments import Attached

RUNNING_MAX: Final = 2  # threads at once
WAITING_MAX: Final = 256
COPY_BYTES: Final = 1 << 20  # asked of the device at once: also how long a stop may wait


class _Job:
    """One CopyBlocks: what each target copies, as parts of (destination, source, bytes), and how it ends. `devices`:
    all that are read or written; `monotonic`: the clock that `until` is of."""

    def __init__(
        self,
        request: CopyBlocks,
        devices: frozenset[str],
        parts: Sequence[tuple[Device, Sequence[tuple[int, int, int]]]],
        answer: Then,
        monotonic: Callable[[], float],
    ) -> None:
        self.slots = (request.source_slot, request.target_slot)
        self.name = (request.source_incarnation, request.number)
        self.devices = devices
        self.answers = [answer]
        self._parts = parts
        self._until = request.until
        self._monotonic = monotonic
        self.stopped = threading.Event()
        self.ended = threading.Event()

    def answer(self, error: ElasticMoEError | None) -> None:
        """Tell all who asked for it."""
        for answer in self.answers:
            answer(error)

    def run(self) -> None:
        """Copy some blocks at a time. Raises Conflict when it was stopped, or is too late."""
        try:
            for target, parts in self._parts:
                count = max(1, COPY_BYTES // parts[0][2]) if parts else 1
                for done in range(0, len(parts), count):
                    if self.stopped.is_set():
                        raise _stale("one of the two ranks ended while blocks were copied")
                    if (late_s := self._monotonic() - self._until) > 0:
                        raise Conflict(f"the copy is {late_s:.1f} s too late", code="stale_copy")
                    target.copy_async(parts[done : done + count]).wait()
        finally:
            self.ended.set()


class BlockCopies:
    """All copies of KV blocks that run or wait. Belongs to the service's loop."""

    def __init__(self, background: Background, clock: Clock = SYSTEM_CLOCK) -> None:
        self._background = background
        self._clock = clock
        self._running: list[_Job] = []
        self._waiting: deque[_Job] = deque()
        self._newest: dict[int, tuple[str, int]] = {}  # by source slot: its rank's incarnation, and its highest number

    def start(
        self,
        request: CopyBlocks,
        memories: Sequence[tuple[DeviceMemory, DeviceMemory]],
        geometry: KvGeometry,
        answer: Then,
    ) -> None:
        """Begin what `check_ranks` has let pass; `answer` is called when it is over, with None where all was copied.
        `memories`: those of source and target, by tp index.

        Raises InvalidRequest for blocks that are not there, Overloaded; Conflict `stale_copy` for one that was asked
        for before and is over, as one after it is.
        """
        if self._is_joined(request, answer):
            return
        if len(self._waiting) >= WAITING_MAX:
            raise Overloaded(f"{WAITING_MAX} copies of blocks wait, the limit")
        parts = [
            (
                target.device,
                [
                    (_address(target, geometry, there), _address(source, geometry, here), geometry.block_bytes)
                    for here, there in request.pairs
                ],
            )
            for source, target in memories
        ]
        devices = frozenset(memory.device.name for pair in memories for memory in pair)
        self._newest[request.source_slot] = (request.source_incarnation, request.number)
        self._waiting.append(_Job(request, devices, parts, answer, self._clock.monotonic))
        self._fill()

    def _is_joined(self, request: CopyBlocks, answer: Then) -> bool:
        """Whether the same copy is on its way; it is answered then as the first one is. Raises Conflict where it has
        ended."""
        incarnation, number = self._newest.get(request.source_slot, ("", 0))
        if incarnation != request.source_incarnation or request.number > number:
            return False
        name = (request.source_incarnation, request.number)
        for job in (*self._running, *self._waiting):
            if job.name == name:
                job.answers.append(answer)
                return True
        raise Conflict(f"copy {request.number} of {incarnation} is over: {number} came since", code="stale_copy")

    def _fill(self) -> None:
        while len(self._running) < RUNNING_MAX:
            busy = {job.slots for job in self._running}
            job = next((job for job in self._waiting if job.slots not in busy), None)
            if job is None:
                return
            self._waiting.remove(job)
            self._running.append(job)
            self._begin(job)

    def _begin(self, job: _Job) -> None:
        def over(result: ElasticMoEError | None) -> None:
            self._running.remove(job)
            job.answer(result)
            self._fill()

        self._background.start("blocks", job.run, over)

    def is_busy(self, device: str) -> bool:
        """Whether a copy reads or writes KV of `device`, or is about to."""
        return any(device in job.devices for job in (*self._running, *self._waiting))

    def stop(self, slot: int) -> None:
        """The rank of `slot` is gone: no copy from or to it may go on."""
        for job in self._running:
            if slot in job.slots:
                job.stopped.set()
        for job in [job for job in self._waiting if slot in job.slots]:
            self._waiting.remove(job)
            job.answer(_stale("one of the two ranks ended before blocks were copied"))

    def wait_stopped(self, slot: int, timeout_s: float) -> bool:
        """Whether no copy that was stopped touches `slot` any more, after at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        jobs = [job for job in self._running if slot in job.slots and job.stopped.is_set()]
        return all(job.ended.wait(max(0.0, deadline - time.monotonic())) for job in jobs)

    def close(self) -> None:
        """Let all end soon."""
        for job in self._running:
            job.stopped.set()
        self._waiting.clear()


def check_ranks(request: CopyBlocks, ranks: tuple[Attached | None, Attached | None]) -> None:
    """Raise Conflict `stale_incarnation` unless both ranks are the ones that the request names; InvalidRequest for one
    and the same."""
    if request.source_slot == request.target_slot:
        raise InvalidRequest(f"slot {request.source_slot} is source and target")
    named = (
        (request.source_slot, request.source_incarnation),
        (request.target_slot, request.target_incarnation),
    )
    for (slot, incarnation), rank in zip(named, ranks, strict=True):
        if rank is None or rank.incarnation != incarnation:
            present = rank.incarnation if rank is not None else "nobody"
            raise _stale(f"slot {slot} is held by {present}, not by {incarnation}")


def _stale(text: str) -> Conflict:
    return Conflict(text, code="stale_incarnation")


def _address(memory: DeviceMemory, geometry: KvGeometry, block: int) -> int:
    handle, index = divmod(block, geometry.blocks_per_handle)
    if handle >= len(memory.kv):
        num_blocks = len(memory.kv) * geometry.blocks_per_handle
        raise InvalidRequest(f"block {block} is not one of the {num_blocks} of {memory.device.name}")
    return memory.address(memory.kv[handle]) + index * geometry.block_stride
