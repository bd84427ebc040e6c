"""What `elasticmoe chaos` does to a deployment: drawn from a seed (pure), and carried out by signals and orders."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

KILL, STOP, LOSE = "kill", "stop", "lose"
DEVICE = "device"  # its rank is stopped, the device told to be lost, and taken again afterwards
# Process -> for how many seconds it may be stopped; 0: only killed. A rank that is stopped for longer than the
# scaler's `rank_stall_s` is ejected and never comes back; the others' work must go on meanwhile.
TARGETS: dict[str, tuple[float, ...]] = {
    "rank": (1.0, 30.0),
    "hmm": (2.0,),
    "scaler": (3.0, 8.0),
    "store": (3.0, 8.0),
    "keeper": (3.0,),
    "pool": (2.0,),
    "router": (1.0,),
}
WEIGHTS = {"rank": 4, "hmm": 2, "scaler": 2, "store": 2, "keeper": 1, "pool": 1, "router": 1, DEVICE: 2}
KILL_SHARE = 0.6
NOT_NEEDED = frozenset({"hmm", "scaler", "store", "keeper", "pool"})  # by streams, for a while


class Fault(NamedTuple):
    """`target`: a process's name, or `rank` or `device` for one that `choice` (0 to 1) picks. `seconds`: how long it is
    stopped."""

    after_s: float
    kind: str
    target: str
    seconds: float
    choice: float

    def __str__(self) -> str:
        return f"{self.kind} {self.target}" + (f" for {self.seconds:g} s" if self.kind == STOP else "")


class Resize(NamedTuple):
    """A scale request. `choice` is a number of replicas; `share` (0 to 1) decides between that and a removal."""

    after_s: float
    choice: int
    share: float

    def body(self, present: list[int]) -> dict[str, Any] | None:
        """Of POST /v1/scale for the replicas that are there; None where nothing would change."""
        if self.share < 0.3 and len(present) > 1:
            return {"remove": [present[self.choice % len(present)]]}
        return {"replicas": self.choice} if self.choice != len(present) else None


def draw_faults(seed: int, seconds: float, every_s: float, *, only_kills: bool = False) -> list[Fault]:
    """Faults for a run of `seconds`, about one each `every_s`. `only_kills`: of processes, nothing else."""
    weights = {name: weight for name, weight in WEIGHTS.items() if name != DEVICE or not only_kills}
    rng = random.Random(f"{seed}/faults")
    faults: list[Fault] = []
    at = 0.0
    while True:
        pause_s = every_s * rng.uniform(0.7, 1.3)
        at += pause_s
        target = rng.choices(list(weights), list(weights.values()))[0]
        kind = LOSE if target == DEVICE else KILL if rng.random() < KILL_SHARE or only_kills else STOP
        fault = Fault(pause_s, kind, target, rng.choice(TARGETS[target]) if kind == STOP else 0.0, rng.random())
        if at > seconds:
            return faults
        faults.append(fault)


def draw_resizes(seed: int, seconds: float, replicas_max: int) -> list[Resize]:
    """Resizes for a run of `seconds`, one each 20 to 60 s."""
    rng = random.Random(f"{seed}/resizes")
    resizes: list[Resize] = []
    at = 0.0
    while True:
        pause_s = rng.uniform(20.0, 60.0)
        at += pause_s
        resize = Resize(pause_s, rng.randint(1, replicas_max), rng.random())
        if at > seconds:
            return resizes
        resizes.append(resize)
