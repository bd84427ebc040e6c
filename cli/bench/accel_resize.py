"""A deployment under load that grows by a replica and shrinks again, with what its own log says of the copies and of
the flips: `bench scaling`'s elastic method, watched more closely."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final

import msgspec

from elasticmoe.cli.bench.scaling_figures import Bounds, Window, gaps_of, longest
from elasticmoe.cli.bench.scaling_methods import Elastic, MethodKind, Outcome
from elasticmoe.cli.bench.scaling_run import Recipe, Run, run_once

_LOG_MS: Final = 1.0  # what logs tell apart
_SEED: Final = 1
_TOLD: Final = {"log_format": "json"}


class Transition(msgspec.Struct, frozen=True):
    """When the HMM entered which phase of an operation, by its log; seconds of the wall clock. The last attempt's."""

    phases: dict[str, float]

    @property
    def copied_s(self) -> float:
        """From its first copy until all it had to make was there, KV among it. 0 where it did not say."""
        return self._between("copying", "staged")

    @property
    def flip(self) -> Window | None:
        """From the commit until all ranks had flipped, as the monotonic clock has it; None where it did not say."""
        if not {"committed", "flipped"} <= self.phases.keys():
            return None
        offset = time.monotonic() - time.time()
        begun, ended = (self.phases[name] + offset for name in ("committed", "flipped"))
        return Window(begun - _LOG_MS / 1e3, ended + _LOG_MS / 1e3)

    def _between(self, first: str, last: str) -> float:
        return self.phases[last] - self.phases[first] if {first, last} <= self.phases.keys() else 0.0


def transition_of(lines: Iterable[str], op_id: str) -> Transition:
    """What an HMM's log in JSON says of an operation."""
    phases: dict[str, float] = {}
    for line in lines:
        try:
            entry = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue  # of another process, or half a line
        if not isinstance(entry, dict) or entry.get("message") != "transition" or entry.get("operation_id") != op_id:
            continue
        phases[str(entry["phase"])] = datetime.fromisoformat(str(entry["ts"])).timestamp()
    return Transition(phases)


class Watched(Elastic):
    """The elastic method. What it found beside lies in the operation, under `watched`: seconds that the HMM's copying
    phase took, and the longest gap of any stream about the flip in milliseconds; None for what its log does not say."""

    async def scale(self, size: int) -> Outcome:
        """See Method."""
        outcome = await super().scale(size)
        path = self._current.run_dir / "logs" / "hmm.log"
        with open(path, encoding="utf-8", errors="replace") as lines:
            transition = transition_of(lines, str(outcome.operation["op_id"]))
        flip = transition.flip
        gap = None if flip is None else longest(gaps_of(self.load.requests, time.monotonic()), flip) * 1e3
        watched = {"copied_s": transition.copied_s, "flip_gap_ms": gap}
        return msgspec.structs.replace(outcome, operation=outcome.operation | {"watched": watched})


def resize(model: str, devices: str, settings: dict[str, Any], *, clients: int, output_tokens: int) -> Run:
    """From one replica to two, and back. Everything it started is gone afterwards. Raises ValueError."""
    recipe = Recipe(
        model=model,
        sizes=(1, 2),
        clients=clients,
        rate=0.0,
        prompt_tokens=64,
        output_tokens=output_tokens,
        steady_s=5.0,
        settle_s=2.0,
        window_s=3.0,
        bounds=Bounds(5.0, 1.0),
        timeout_s=600.0,
        kv_bytes=settings["kv_bytes"],
        settings=settings | _TOLD,
        devices=devices,
    )
    return asyncio.run(run_once(recipe, MethodKind(Watched), _SEED))
