"""Makes requests with certain seeds what no client can send yet: ones that their rank fails of.

Python runs this file at the start of each process whose PYTHONPATH names its folder. It changes only the process that
ranks are forked from. Owned by test_poison.py, which imports it for the seeds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

BASE = 7_000_000_000_000
STAGES = ("exchange", "choice", "commit", "report", "plan")
STRIKES = "POISON_STRIKES"  # names a file
ACTIONS = ("raises", "is killed", "crashes", "hangs")


def seed_of(stage: str, action: str, position: int) -> int:
    """The seed of a request that does `action` at `stage` of the step which computes `position`."""
    return BASE + STAGES.index(stage) * 10**8 + ACTIONS.index(action) * 10**6 + position


def is_hit(stage: str, sequence: Any) -> str:
    """What the sequence does at this stage of its present step; empty for nothing."""
    code = sequence.request.sampling.seed - BASE
    if not 0 <= code < len(STAGES) * 10**8 or STAGES[code // 10**8] != stage:
        return ""
    return ACTIONS[code // 10**6 % 100] if len(sequence.tokens) > code % 10**6 else ""


def note_strike(request_id: str) -> None:
    """For the test: under which id it is that the request strikes now."""
    if path := os.environ.get(STRIKES):
        with open(path, "a") as file:
            file.write(f"{request_id}\n")


def act(action: str) -> None:
    """What a defect would do."""
    if action == "raises":
        raise IndexError("index 7 is out of bounds for axis 0 with size 5")
    if action == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "crashes":
        ctypes.string_at(8)
    while action == "hangs":
        pass


def patch() -> None:
    """Let the engine and the exchange do so."""
    from elasticmoe.services.worker.engine import sampler
    from elasticmoe.services.worker.engine.engine import Engine
    from elasticmoe.services.worker.engine.plan import Draft
    from elasticmoe.services.worker.exchange.shm import ShmExchange

    now: list[Any] = []  # sequences of the present step

    def before(owner: Any, name: str, stage: str, subjects: Callable[..., Any]) -> None:
        real = getattr(owner, name)

        def struck(*args: Any, **kwargs: Any) -> Any:
            for sequence in subjects(*args):
                if action := is_hit(stage, sequence):
                    note_strike(sequence.request.request_id)
                    act(action)
            return real(*args, **kwargs)

        setattr(owner, name, struck)

    def note(_engine: Any, plan: Any, *_: Any) -> list[Any]:
        now[:] = [chunk.sequence for chunk in plan.chunks]
        return []

    before(Engine, "compute", "", note)
    before(ShmExchange, "dispatch", "exchange", lambda *_: now)
    before(sampler, "_choice_of", "choice", lambda state: [_Sampled(state)])
    before(Engine, "_commit_ledger", "commit", lambda _engine, chunks: [chunk.sequence for chunk in chunks])
    before(Engine, "_report", "report", lambda _engine, sequence, *_: [sequence])
    before(Draft, "add", "plan", lambda _draft, sequence, *_: [sequence])


class _Sampled:
    """A SamplingState as a sequence."""

    def __init__(self, state: Any) -> None:
        self.request, self.tokens = state.request, state.tokens


if "elasticmoe.services.worker.pool.template" in sys.orig_argv:
    patch()
