"""The self-test of `elasticmoe doctor --device`: processes that do with a device's memory what an HMM and its ranks do,
and that are killed. The doctor itself loads no driver: one that hangs or crashes costs a process, not the report.

- `owner` makes memory and exports it; `rank`, `second` and `late` import it, as ranks do.
- `witness` has nothing, and sees how much of the device is free.
- The doctor keeps what was exported, as the keeper does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

from elasticmoe.cli.console import size
from elasticmoe.cli.doctor_process import TestProcess
from elasticmoe.cli.finding import Finding, Level
from elasticmoe.common.capacity import AVAILABLE_SHARE
from elasticmoe.common.devices.names import DeviceId
from elasticmoe.common.protocol.errors import ElasticMoEError

_NUM_HANDLES: Final = 8
_NUM_CALLS: Final = 32
_SECONDS: Final = 60.0  # of an order
_GIVEN_BACK_S: Final = 10.0  # a driver may tidy up after a dead process in its own time
_POLL_S: Final = 0.1
_MARK: Final = "memory"
Step = Callable[[], tuple[Level, str, dict[str, float]]]


class SelfTest:
    """See the module's text. Each step's finding is in the list that `run` returns; what a failed step was needed for
    is not run."""

    def __init__(self, device: str, parts: int = 1) -> None:
        """`parts`: the devices that a deployment is to divide it into, of which the budgets are told."""
        self._device, self._kind = device, DeviceId.parse(device).backend
        self._parts = parts
        self._admits = self._kind == "npu"  # the owner names who may import
        self._processes = ExitStack()
        self._tokens: list[tuple[dict[str, int], int | None]] = []
        self._handle_bytes = 0
        self._free_before = -1

    def run(self) -> list[Finding]:
        """Takes seconds on a device in order, and at most some minutes on any."""
        steps: list[tuple[str, Step]] = [
            ("open", self._open),
            ("access to other devices", self._reaches),
            ("create, export, map, unmap", self._calls),
            ("copy", self._copies),
            ("a stranger imports", self._stranger),
            ("import and share", self._share),
            ("importer killed", self._importer_killed),
            ("exporter killed", self._exporter_killed),
            ("import after that", self._late),
            ("memory given back", self._given_back),
        ]
        findings: list[Finding] = []
        try:
            for name, step in steps:
                failed = next((one.name for one in findings if one.level == "fail"), None)
                findings.append(_not_run(name, failed) if failed else _made(name, step))
        finally:
            self._processes.close()
            for _, fd in self._tokens:
                if fd is not None:
                    os.close(fd)
        opened = findings[0].level != "fail"
        name = "remap under a captured graph"
        findings.append(_made(name, self._graph) if opened else _not_run(name, findings[0].name))
        return findings

    def _start(self) -> TestProcess:
        process = self._processes.enter_context(TestProcess(self._device))
        process.ask("open")
        return process

    def _open(self) -> tuple[Level, str, dict[str, float]]:
        self._owner = self._processes.enter_context(TestProcess(self._device))
        told = self._owner.ask("open")
        self._witness, self._rank = self._start(), self._start()
        self._handle_bytes = told["granularity"]
        self._free_before = self._witness.ask("free", seconds=_SECONDS)
        version = told["version"] or "unknown"
        text = f"{told['library']}, version {version}; granularity {size(self._handle_bytes)}"
        figures = {"granularity_bytes": float(self._handle_bytes)}
        free, total = told["free_bytes"], told["total_bytes"]
        if total < 0:
            return "ok", f"{text}; the driver does not say how much memory there is", figures
        budget = int(total * AVAILABLE_SHARE) // self._parts // self._handle_bytes * self._handle_bytes
        figures |= {"free_bytes": float(free), "total_bytes": float(total), "budget_bytes": float(budget)}
        text += f"; {size(free)} of {size(total)} are free"
        each = f"; the budget of {'it' if self._parts == 1 else f'each of {self._parts} parts'} is {size(budget)}"
        text += f"{each}, {AVAILABLE_SHARE:.0%} of {'it' if self._parts == 1 else 'all'}"
        if free < budget * self._parts:
            return "warn", f"{text}, and so much is not free: give --device-memory", figures
        return "ok", text, figures

    def _reaches(self) -> tuple[Level, str, dict[str, float]]:
        told: dict[str, bool] = self._owner.ask("reaches", seconds=_SECONDS)
        if not told:
            return "not run", "the driver shows no other device", {}
        if lacking := [name for name, reaches in told.items() if not reaches]:
            text = f"{self._device} cannot access the memory of {', '.join(lacking)}: a deployment on both needs"
            return "warn", f"{text} --exchange shm" if self._kind == "cuda" else f"{text} NPUs that can", {}
        return "ok", f"it can access the memory of {', '.join(told)}", {}

    def _calls(self) -> tuple[Level, str, dict[str, float]]:
        took = self._owner.ask("calls", _NUM_CALLS, seconds=_SECONDS)
        return "ok", _times(took), took

    def _copies(self) -> tuple[Level, str, dict[str, float]]:
        told = self._owner.ask("copies", seconds=_SECONDS)
        text = f"{told['copy_bytes_per_s'] / 1e9:.1f} GB/s, {size(told['copy_bytes'])} at once"
        return "ok", text, told

    def _stranger(self) -> tuple[Level, str, dict[str, float]]:
        self._owner.ask("make", [f"{_MARK}{at}" for at in range(_NUM_HANDLES)], seconds=_SECONDS)
        for at in range(_NUM_HANDLES):
            self._tokens.append(self._owner.ask_for_descriptor("export", at, seconds=_SECONDS))
        if not self._admits:
            return "not run", "a descriptor admits whoever has it", {}
        code = self._refusal(self._rank)
        if code != "not_admitted":
            return "fail", f"a process that was not admitted: {code or 'has the memory'}", {}
        return "ok", "refused: it was not admitted", {}

    def _refusal(self, process: TestProcess) -> str:
        """The code that an import is refused with; empty where it is not."""
        token, fd = self._tokens[0]
        try:
            process.ask("take", token, fd=fd, seconds=_SECONDS)
        except ElasticMoEError as error:
            return error.code
        return ""

    def _attach(self, process: TestProcess) -> dict[str, float]:
        """Let a process import all, and microseconds of the slowest handle."""
        if self._admits:
            self._owner.ask("admit", [process.ask("number", seconds=_SECONDS)], seconds=_SECONDS)
        took = [process.ask("take", token, fd=fd, seconds=_SECONDS) for token, fd in self._tokens]
        return {name: max(one[name] for one in took) for name in took[0]}

    def _share(self) -> tuple[Level, str, dict[str, float]]:
        took = self._attach(self._rank)
        self._rank.ask("write", 0, "from the rank", seconds=_SECONDS)
        if (found := self._owner.ask("read", 0, 13, seconds=_SECONDS)) != "from the rank":
            return "fail", f"the owner reads {found!r} where a rank has written", took
        if wrong := self._unlike(self._rank, range(1, _NUM_HANDLES)):
            return "fail", wrong, took
        return "ok", f"both see what the other writes; slowest of {_NUM_HANDLES}: {_times(took)}", took

    def _unlike(self, process: TestProcess, numbers: range) -> str:
        for at in numbers:
            text = f"{_MARK}{at}"
            if (found := process.ask("read", at, len(text), seconds=_SECONDS)) != text:
                return f"handle {at} has {found!r}, not {text!r}"
        return ""

    def _importer_killed(self) -> tuple[Level, str, dict[str, float]]:
        self._rank.kill()
        wrong = self._unlike(self._owner, range(1, _NUM_HANDLES))
        return ("fail", wrong, {}) if wrong else ("ok", "the owner has everything", {})

    def _exporter_killed(self) -> tuple[Level, str, dict[str, float]]:
        self._second = self._start()
        self._attach(self._second)
        self._owner.kill()
        if wrong := self._unlike(self._second, range(1, _NUM_HANDLES)):
            return "fail", wrong, {}
        free = self._witness.ask("free", seconds=_SECONDS)
        figures = {"free_bytes": float(free)} if free >= 0 else {}
        return "ok", "what a rank had imported it still has", figures

    def _late(self) -> tuple[Level, str, dict[str, float]]:
        late = self._start()
        code = self._refusal(late)
        late.kill()
        expected = "not_admitted" if self._admits else ""
        text = f"it is refused with {code}" if code else "it has the memory"
        if code != expected:
            return "fail", f"{text}, which is not what the project relies on: send this report", {}
        return "ok", text, {}

    def _given_back(self) -> tuple[Level, str, dict[str, float]]:
        """All but the witness end, and what the doctor keeps."""
        self._second.kill()
        while self._tokens:
            _, fd = self._tokens.pop()
            if fd is not None:
                os.close(fd)
        if self._free_before < 0:
            return "unknown", "the driver does not say how much memory is free", {}
        least = self._free_before - self._handle_bytes // 2
        deadline = time.monotonic() + _GIVEN_BACK_S
        while (free := self._witness.ask("free", seconds=_SECONDS)) < least and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        figures = {"free_before_bytes": float(self._free_before), "free_bytes": float(free)}
        if free < least:
            text = f"{size(self._free_before - free)} less is free than before; other processes may have taken it"
            return "unknown", text, figures
        return "ok", "as much is free as before", figures

    def _graph(self) -> tuple[Level, str, dict[str, float]]:
        with TestProcess(self._device) as process:
            told = process.ask("graph")
        if "reason" in told:
            return "not run", told["reason"], {}
        if told["before"] > 0 and told["after"] == 2 * told["before"]:
            return "ok", "a replay reads what is mapped at its addresses now", told
        return "fail", f"replays gave {told['before']:g}, then {told['after']:g}, not twice as much", told


def _made(name: str, step: Step) -> Finding:
    try:
        level, text, figures = step()
    except ElasticMoEError as error:
        return Finding(name, "fail", f"{error.code}: {error.message}")
    return Finding(name, level, text, figures=figures)


def _not_run(name: str, failed: str) -> Finding:
    return Finding(name, "not run", f"`{failed}` has failed")


def _times(took: dict[str, Any]) -> str:
    return ", ".join(f"{name.removesuffix('_us')} {value:g} µs" for name, value in took.items())
