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
    """When the HMM entered which phase of an operation's legs, by its log: seconds of the wall clock, by each attempt's
    name. Only what was committed counts: what an attempt copied that was given up is copied again."""

    attempts: dict[str, dict[str, float]]

    @property
    def copied_s(self) -> float:
        """Of all legs together, from the first copy until all that was to be made was there, KV among it. 0 where the
        log does not say it of each."""
        legs = self._legs
        is_told = legs and all({"copying", "staged"} <= phases.keys() for phases in legs)
        return sum(phases["staged"] - phases["copying"] for phases in legs) if is_told else 0.0

    @property
    def flips(self) -> list[Window] | None:
        """Of each leg, from the commit until all ranks had flipped, as the monotonic clock has it; None where the log
        does not say it of each."""
        legs = self._legs
        if not legs or not all("flipped" in phases for phases in legs):
            return None
        offset, margin = time.monotonic() - time.time(), _LOG_MS / 1e3
        return [Window(phases["committed"] + offset - margin, phases["flipped"] + offset + margin) for phases in legs]

    @property
    def _legs(self) -> list[dict[str, float]]:
        return [phases for phases in self.attempts.values() if "committed" in phases]


def transition_of(lines: Iterable[str], op_id: str) -> Transition:
    """What an HMM's log in JSON says of an operation."""
    attempts: dict[str, dict[str, float]] = {}
    for line in lines:
        try:
            entry = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue  # of another process, or half a line
        if not isinstance(entry, dict) or entry.get("message") != "transition" or entry.get("operation_id") != op_id:
            continue
        phases = attempts.setdefault(str(entry["attempt"]), {})
        phases[str(entry["phase"])] = datetime.fromisoformat(str(entry["ts"])).timestamp()
    return Transition(attempts)


class Watched(Elastic):
    """The elastic method. What it found beside lies in the operation, under `watched`: seconds that the HMM's copying
    phases took, and the longest gap of any stream about a flip in milliseconds; None for what its log does not say."""

    async def scale(self, size: int) -> Outcome:
        """See Method."""
        outcome = await super().scale(size)
        path = self._current.run_dir / "logs" / "hmm.log"
        with open(path, encoding="utf-8", errors="replace") as lines:
            transition = transition_of(lines, str(outcome.operation["op_id"]))
        gap: float | None = None
        if (flips := transition.flips) is not None:
            gaps = gaps_of(self.load.requests, time.monotonic())
            gap = max(longest(gaps, flip) for flip in flips) * 1e3
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
