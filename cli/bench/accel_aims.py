"""What `bench accel` measures beside an aim, and whether that is met. Pure: the figures come from the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

ATTACH_MS_MAX: Final = 200.0
FLIP_MORE_MS_MAX: Final = 5.0  # beyond one step
COPIES_SHARE_MIN: Final = 0.7  # of what plain copies of the same sizes get
DECODE_FLOORS_MAX: Final = 1.5  # times the floor
BATCHES: Final = (1, 8, 32)
AIMS: Final[dict[str, str]] = {
    "attach": f"at most {ATTACH_MS_MAX:g} ms",
    "flip": f"a gap of at most one step and {FLIP_MORE_MS_MAX:g} ms",
    "copies": f"at least {COPIES_SHARE_MIN:.0%} of plain copies beside them",
    **{f"decode, batch {batch}": f"at most {DECODE_FLOORS_MAX:g} times the floor" for batch in BATCHES},
}
"""By name, in the order of the table."""
_STEPS: Final = {"attach": "attach", "flip": "scaling", "copies": "scaling"}  # that measure them; else decode
NOT_MEASURED: Final = "not measured"


class Aim(msgspec.Struct, frozen=True):
    """What was found of one. `figures`: the numbers that the text has, by name."""

    result: Literal["met", "missed", "not measured"]
    text: str
    figures: dict[str, float] = {}


def attach_aim(median_ms: float) -> Aim:
    """Of a standby that maps a dead rank's memory."""
    return _aim(median_ms <= ATTACH_MS_MAX, f"{median_ms:.4g} ms", median_ms=median_ms)


def flip_aim(step_ms: float, gaps_ms: Sequence[float], flips_ms: Sequence[float]) -> Aim:
    """`step_ms`: the median gap between a stream's tokens before; `gaps_ms`: the longest in each resize, and
    `flips_ms` the longest about its flip."""
    most, flip = max(gaps_ms), max(flips_ms)
    text = f"the longest gap of a resize {most:.4g} ms, about a flip {flip:.4g} ms, a step {step_ms:.4g} ms"
    figures = {"gap_ms": most, "flip_gap_ms": flip, "step_ms": step_ms, "ratio": most / step_ms}
    return _aim(most <= step_ms + FLIP_MORE_MS_MAX, f"{text}: {most / step_ms:.3g} times", **figures)


def copies_aim(nbytes: int, seconds: float, ceiling_bytes_per_s: float) -> Aim:
    """Of a growth: what was copied in which time, and what plain copies of the same sizes get."""
    if seconds <= 0 or not nbytes:
        return Aim(NOT_MEASURED, f"{nbytes} bytes were copied in less than the millisecond that logs tell apart")
    rate = nbytes / seconds
    share = rate / ceiling_bytes_per_s
    text = f"{nbytes / 1e6:.4g} MB in {seconds * 1e3:.4g} ms, {rate / 1e9:.4g} GB/s, of {ceiling_bytes_per_s / 1e9:.4g}"
    figures = {"bytes": nbytes, "seconds": seconds, "ceiling_bytes_per_s": ceiling_bytes_per_s, "ratio": share}
    return _aim(share >= COPIES_SHARE_MIN, f"{text}: {share:.1%}", **figures)


def decode_aim(step_ms: float, nbytes: float, bytes_per_s: float) -> Aim:
    """`nbytes`: that the step has to read; `bytes_per_s`: what the device reads and writes in a large copy."""
    floor_ms = nbytes / bytes_per_s * 1e3
    ratio = step_ms / floor_ms
    text = f"{step_ms:.4g} ms a step, floor {floor_ms:.3g} ms ({nbytes / 1e6:.4g} MB at {bytes_per_s / 1e9:.4g} GB/s)"
    figures = {"step_ms": step_ms, "floor_ms": floor_ms, "bytes": nbytes, "bytes_per_s": bytes_per_s, "ratio": ratio}
    return _aim(ratio <= DECODE_FLOORS_MAX, f"{text}: {ratio:.3g} times", **figures)


def _aim(is_met: bool, text: str, **figures: float) -> Aim:
    return Aim("met" if is_met else "missed", text, figures)


def all_aims(found: Mapping[str, Aim], results: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each aim as a row, those that nothing was found of among them. `results`: of the steps that ran, by name."""
    rows = []
    for name, wanted in AIMS.items():
        step = _STEPS.get(name, "decode")
        aim = found.get(name) or Aim(NOT_MEASURED, f"{step}: {results.get(step, 'not asked for')}")
        rows.append({"aim": name, "wanted": wanted, "result": aim.result, "found": aim.text, "figures": aim.figures})
    return rows
