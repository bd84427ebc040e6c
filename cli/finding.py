"""What a check of `elasticmoe doctor` has found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "warn", "fail", "unknown", "not run"]
COLORS: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "red", "unknown": "yellow", "not run": "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's result. `level`: `unknown` where nobody said, `not run` where the check could not be made, with the
    reason in `text`; neither is ok. `fix` says what to do; empty where there is nothing to do. `figures`: what was
    measured, by names that end in their units."""

    name: str
    level: Level
    text: str
    fix: str = ""
    figures: dict[str, float] = field(default_factory=dict)
