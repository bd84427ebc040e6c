"""Captured graphs: what a section queues for a step of one form is kept, and queued again by one call.

What is kept has its numbers and addresses in it, and reads all else from memory. So a step that uses it is brought to a
form: as many rows as the form has, padding behind the batch's own, and room for as many positions. Everything that is
read lies at addresses that stay: buffers, a step's numbers (SentFields), weights and KV, also where memory is mapped
anew under them. Where some of that moves (`Graphs.moves`), all is captured again.

Experts are not captured: how many rows each has is known in mid-step only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

import torch

from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.worker.backends.accelerator.batch import AcceleratorBatch, Form
from elasticmoe.services.worker.backends.base import BatchOp
from elasticmoe.services.worker.model.batch import Batch

ROWS_MAX: Final = 64  # of a form: larger steps compute for longer than they take to be queued
POSITIONS_MIN: Final = 2_048  # of the smallest form; others have 4, 16, ... times as many
FORMS_MAX: Final = 12  # of which graphs are kept, those that came last: a graph takes memory beside what is budgeted
CAPTURES_PER_STEP: Final = 4  # sections: capturing takes a millisecond or so, and the ranks wait for each other

log = get_logger("graphs")


class Recorder(Protocol):
    """What records the device's queue."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` queues, and queue none of it. Each call of what is returned queues it once. Raises what the
        device's runtime raises."""


class TorchRecorder:
    """By torch's graphs of a device; what they hold in between comes from one pool."""

    def __init__(self, device: torch.device) -> None:
        self._module = torch.get_device_module(device)
        self._pool = self._module.graph_pool_handle()
        self._last: Any = None  # torch gives up a pool of which there is no graph any more
        self._stream = self._module.Stream(device)  # nothing is recorded on the default one

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See Recorder. Not by torch's context manager, which stops the device and empties its caches each time."""
        graph = self._module.CUDAGraph()
        with self._module.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        self._last = graph
        replay: Callable[[], None] = graph.replay
        return replay


class Graphs:
    """Of one backend. `recorder`: None captures nothing. `count_moves`: how often what sections read has moved."""

    def __init__(self, recorder: Recorder | None, count_moves: Callable[[], int]) -> None:
        self._recorder, self._count_moves = recorder, count_moves
        self._rows_max = 0  # what all sections have room for
        self._num_left = 0  # captures that this step may make
        self._is_warming_up = False
        self.num_captured = 0

    @property
    def is_capturing(self) -> bool:
        """Whether there is anything to record with."""
        return self._recorder is not None

    def section(self, run: BatchOp, rows_max: int) -> BatchOp:
        """See ComputeBackend.section."""
        if self._recorder is None:
            return run
        self._rows_max = min(rows_max, self._rows_max or ROWS_MAX, ROWS_MAX)
        return _Section(self, run)

    @contextmanager
    def warming_up(self, rows_max: int) -> Iterator[tuple[int, ...]]:
        """See ComputeBackend: of all forms with few positions. A step captures all that it can: nobody waits."""
        rows_max = min(rows_max, self._rows_max)
        rows = {min(1 << bits, rows_max) for bits in range(rows_max.bit_length() + 1)} if rows_max else set()
        self._is_warming_up = True
        try:
            yield tuple(sorted(rows, reverse=True)) if self._recorder is not None else ()
        finally:
            self._is_warming_up = False

    def form_of(self, batch: Batch) -> Form | None:
        """The form of a step that only decodes; None for others, which are computed as they are. A step begins."""
        self._num_left = 1 << 30 if self._is_warming_up else CAPTURES_PER_STEP
        n = batch.num_rows
        if self._recorder is None or not 0 < n <= self._rows_max or not n == batch.num_parts == batch.num_logits:
            return None
        positions = POSITIONS_MIN
        while positions < max(batch.kv_lens):
            positions *= 4
        return Form(min(1 << (n - 1).bit_length(), self._rows_max), positions)

    @property
    def moves(self) -> int:
        """Changes when what was captured must not be used any more."""
        return self._count_moves()

    def record(self, run: Callable[[], None]) -> Callable[[], None] | None:
        """`run` as a graph; None where this step has captured enough, or there are no graphs to be had."""
        if self._recorder is None or not self._num_left:
            return None
        self._num_left -= 1
        try:
            replay = self._recorder.record(run)
        except Exception as error:  # the step can be computed all the same
            log.exception("graphs are given up", because=f"{type(error).__name__}: {str(error)[:200]}")
            self._recorder = None
            return None
        self.num_captured += 1
        return replay


class _Section:
    """Computed as it is the first time that a form comes, for what is compiled and allocated then; then captured."""

    def __init__(self, graphs: Graphs, run: BatchOp) -> None:
        self._graphs, self._run = graphs, run
        self._moves = -1
        self._kept: dict[Form, Callable[[], None] | None] = {}

    def __call__(self, step: AcceleratorBatch) -> None:
        form = step.form
        if form is None:
            self._run(step)
            return
        self._forget_if_moved()
        if form not in self._kept:
            self._run(step)
            self._forget_if_moved()  # by this run
            self._kept[form] = None
            if len(self._kept) > FORMS_MAX:
                del self._kept[next(iter(self._kept))]
            return
        replay = self._kept.pop(form) or self._graphs.record(lambda: self._run(step))
        self._kept[form] = replay  # the last one that came
        if replay is None:
            self._run(step)
            return
        replay()

    def _forget_if_moved(self) -> None:
        if self._graphs.moves != self._moves:
            self._moves = self._graphs.moves
            self._kept.clear()
