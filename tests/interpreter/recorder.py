"""A recorder of what is queued, on the CPU: launches of Triton's kernels and torch's operations, with the very numbers
and tensors that they were called with. Like a device's graph it computes nothing while it records, and a replay reads
nothing anew but the memory that the calls name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

Call = Callable[[], Any]
_recording = threading.local()
_launch = GridExecutor.__call__


def _launch_or_record(self: Any, *args: Any, **options: Any) -> Any:
    calls: list[Call] | None = getattr(_recording, "calls", None)
    if calls is None:
        return _launch(self, *args, **options)
    calls.append(lambda: _launch(self, *args, **options))
    return None


class _Operations(TorchDispatchMode):
    """Views are made and never again; what writes to a tensor is not done; what makes a tensor, makes it, and a replay
    writes there."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self._calls.append(lambda: func(*args, **kwargs))
            return kwargs.get("out", args[0])
        made = func(*args, **kwargs)
        if not func.is_view:
            assert isinstance(made, torch.Tensor), f"{func} makes no tensor"
            self._calls.append(lambda: made.copy_(func(*args, **kwargs)))
        return made


class CallRecorder:
    """See Recorder. `num_replays`: of all that was recorded. `error`: raised by the next recording."""

    def __init__(self) -> None:
        self.num_records = self.num_replays = 0
        self.error: Exception | None = None

    def record(self, run: Call) -> Call:
        """See Recorder."""
        if self.error is not None:
            raise self.error
        calls: list[Call] = []
        with _to(calls), _Operations(calls):
            run()
        self.num_records += 1

        def replay() -> None:
            self.num_replays += 1
            for call in calls:
                call()

        return replay


@contextmanager
def _to(calls: list[Call]) -> Iterator[None]:
    _recording.calls = calls
    try:
        yield
    finally:
        _recording.calls = None


def install() -> None:
    """Let launches be recorded; once for a process, after all else that wraps them."""
    global _launch
    _launch = GridExecutor.__call__
    GridExecutor.__call__ = _launch_or_record
