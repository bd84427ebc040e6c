"""`elasticmoe bench accel`: what accelerators here do, from the memory of one to a deployment that is resized.

| step | what it is | right where |
|---|---|---|
| contract | the self-test of `doctor --device`, in real processes | no step of it fails |
| parity | greedy answers in float32 beside those of a `host` deployment of torch | logprobs agree until tokens differ |
| oracle | the same answers while it is resized between one replica and two | each token and logprob is equal |
| attach, scaling, decode | the benchmarks of these names, each a command of its own | they end well |

Every step runs, whatever the others say. One table, and one file with the hardware, the versions and the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import httpx

from elasticmoe.cli.bench.accel_answers import GreedyAnswer, answers_of, difference
from elasticmoe.cli.bench.deployment import COMMAND, first_of, running
from elasticmoe.cli.bench.report import add_output, provenance, table, write_raw
from elasticmoe.cli.doctor_facts import facts
from elasticmoe.cli.doctor_process import TestProcess
from elasticmoe.cli.doctor_selftest import SelfTest
from elasticmoe.cli.endings import run_command
from elasticmoe.cli.finding import Finding
from elasticmoe.cli.settings import importing_environment, parse_size
from elasticmoe.cli.terminal import say
from elasticmoe.common.config import environment_of
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.layout import COMPUTES
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.wording import counted

_KINDS: Final = ("npu", "cuda")
_FAILURES: Final = (  # of a step whose deployment, child or answer is not as it should be: the others go on
    *(ElasticMoEError, httpx.HTTPError, subprocess.SubprocessError),
    *(ValueError, LookupError, TypeError, OSError),
)
_STEP_S: Final = 1800.0  # of a benchmark
_TOLERANCE: Final = 0.02  # of a logprob in float32, of sums in another order
_RESIZES: Final = 4
Step = Callable[[], tuple[bool, str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench accel`."""
    add = parser.add_argument
    add("--devices", default="", help="such as npu:0-1 or cuda:0/2 (default: the first two, or both halves of one)")
    add("--model", default="tiny-mixtral", help="name or path")
    add("--device-memory", type=parse_size, default=1 << 30, metavar="SIZE", help="budget of each device")
    add("--compute", choices=sorted({one for kind in _KINDS for one in COMPUTES[kind]}), help="what computes there")
    add("--steps", default="all", help="comma-separated, of contract, parity, oracle, attach, scaling, decode")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write raw data; the exit status (1: some step failed). Raises ElasticMoEError where
    there is no accelerator, ValueError for steps and devices that there are not."""
    devices = DeviceCount.parse(args.devices or found())
    if devices.backend not in _KINDS:
        raise ValueError(f"--devices {devices} are no accelerators: these are {' and '.join(_KINDS)}")
    if args.compute and args.compute not in COMPUTES[devices.backend]:
        raise ValueError(f"{args.compute} does not compute on {devices}: {' or '.join(COMPUTES[devices.backend])} do")
    accelerators = _Accelerators(args, devices)
    steps: dict[str, Step] = {
        "contract": accelerators.contract,
        "parity": accelerators.parity,
        "oracle": accelerators.oracle,
        "attach": accelerators.attach,
        "scaling": accelerators.scaling,
        "decode": accelerators.decode,
    }
    wanted = list(steps) if args.steps == "all" else args.steps.split(",")
    if unknown := [name for name in wanted if name not in steps]:
        raise ValueError(f"unknown step {unknown[0]!r}; known: {', '.join(steps)}")
    rows: list[dict[str, Any]] = []
    raw: dict[str, Any] = {}
    for name in wanted:
        begun = time.monotonic()
        try:
            is_right, text, raw[name] = steps[name]()
        except _FAILURES as error:
            is_right, text, raw[name] = False, str(error) or type(error).__name__, None
        row = {"step": name, "result": "ok" if is_right else "failed", "s": round(time.monotonic() - begun, 1)}
        rows.append(row | {"found": text})
    say(table(rows))
    data: dict[str, Any] = {"provenance": provenance(" ".join(["elasticmoe", *sys.argv[1:]]))}
    data |= {"devices": str(accelerators.devices), "installed": [asdict(one) for one in accelerators.installed()]}
    data |= {"rows": rows, "raw": raw}
    say(f"raw data: {write_raw(args.output, f'accel-{accelerators.devices.backend}', data)}")
    return 1 if any(row["result"] != "ok" for row in rows) else 0


def found() -> str:
    """The setting of the first two devices of a driver of this machine, or of both halves of its only one. Raises
    ElasticMoEError, whose text has each driver's reason."""
    reasons = []
    for kind in _KINDS:
        if reason := _missing(f"{kind}:0"):
            reasons.append(reason)
        else:
            return f"{kind}:0/2" if _missing(f"{kind}:1") else f"{kind}:0,{kind}:1"
    raise ElasticMoEError(f"there is no accelerator: {'; '.join(reasons)}", code="nothing_measured")


def _missing(device: str) -> str:
    """Why a device cannot be used; empty where it can. In a process, which loads its driver."""
    with TestProcess(device) as process:
        try:
            process.ask("open")
        except ElasticMoEError as error:
            return error.message
    return ""


class _Accelerators:
    """The steps, on `devices`."""

    def __init__(self, args: argparse.Namespace, devices: DeviceCount) -> None:
        self.devices = devices
        self._model: str = args.model
        self._settings: dict[str, Any] = {"device_bytes": args.device_memory}
        if args.compute:
            self._settings["compute"] = args.compute
        self._answers: list[GreedyAnswer] = []

    def installed(self) -> list[Finding]:
        """Versions, nodes and limits."""
        return facts(self.devices.backend, self.devices.indices[0], os.environ)

    def contract(self) -> tuple[bool, str, Any]:
        """See the module's text."""
        findings = SelfTest(self.devices.names()[0]).run()
        counts = {level: sum(one.level == level for one in findings) for level in ("ok", "fail", "unknown", "not run")}
        failed = "; ".join(f"{one.name}: {one.text}" for one in findings if one.level == "fail")
        text = ", ".join(f"{num} {level}" for level, num in counts.items() if num) + (f" ({failed})" if failed else "")
        return not failed, text, [asdict(one) for one in findings]

    def parity(self) -> tuple[bool, str, Any]:
        """See the module's text."""
        with running(self._model, 1, devices=first_of(str(self.devices), 1), dtype="float32", **self._settings) as ours:
            mine = answers_of(ours.url)
        with running(self._model, 1, dtype="float32", compute="torch") as theirs:
            reference = answers_of(theirs.url)
        most, num_equal = difference(mine, reference)
        text = f"{num_equal} of {len(mine)} answers have the same tokens; logprobs differ by {most:.2g} at most"
        return most <= _TOLERANCE, text, {"most": most, "equal": num_equal, "answers": len(mine)}

    def oracle(self) -> tuple[bool, str, Any]:
        """See the module's text."""
        if self.devices.count < 2:
            raise ValueError("a deployment that is resized needs two devices")
        with running(self._model, 2, devices=first_of(str(self.devices), 2), **self._settings) as deployment:
            before, wrong = answers_of(deployment.url), 0
            for turn in range(_RESIZES):
                where = ["--replicas", str(1 + turn % 2), "--wait", "--run-dir", str(deployment.run_dir)]
                subprocess.run([*COMMAND, "scale", *where], check=True, timeout=_STEP_S, stdout=subprocess.DEVNULL)
                wrong += sum(a != b for a, b in zip(before, answers_of(deployment.url), strict=True))
        text = f"{wrong} of {_RESIZES * len(before)} answers changed in {_RESIZES} resizes"
        return wrong == 0, text, {"resizes": _RESIZES, "answers": len(before), "changed": wrong}

    def attach(self) -> tuple[bool, str, Any]:
        """See the module's text."""
        rows = self._bench("attach", 2, "--models", self._model, "--deployments", "1", "--kills", "3")["rows"]
        return True, _figures(rows[0], "attach ms median", "serving again ms median"), rows

    def scaling(self) -> tuple[bool, str, Any]:
        """See the module's text."""
        words = ["--model", self._model, "--from", "1", "--to", "2", "--methods", "elastic", "--loads", "closed"]
        words += ["--closed", "8", "--rounds", "1", "--steady-s", "5", "--settle-s", "2", "--kv-memory", "64MiB"]
        data = self._bench("scaling", 2, *words)
        changes = [change for run in data["runs"] for change in run["run"]["figures"]]
        told = [f"{one['direction']} {one['done_s']:.3g} s, pause {one['pause_ms']:.3g} ms" for one in changes]
        failed = sum(one["failed"] for one in changes)
        return failed == 0, f"{'; '.join(told)}; {counted(failed, 'request')} failed", data

    def decode(self) -> tuple[bool, str, Any]:
        """See the module's text."""
        words = ["--models", self._model, "--replicas", "1", "--concurrency", "1,8,32", "--prompt-tokens", "64"]
        rows = self._bench("serve", 1, *words, "--output-tokens", "32", "--rounds", "1")["rows"]
        return True, "; ".join(_figures(row, "concurrency", "tokens/s best") for row in rows), rows

    def _bench(self, name: str, num: int, *words: str) -> dict[str, Any]:
        """What the benchmark of that name has written, on the first `num` devices. Raises ValueError."""
        with tempfile.TemporaryDirectory(prefix="em-accel-") as folder:
            command = [*COMMAND, "bench", name, *words, "--devices", first_of(str(self.devices), num)]
            status, said = run_command(
                [*command, "--output", folder],
                env=importing_environment() | environment_of(self._settings),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout_s=_STEP_S,
            )
            files = sorted(Path(folder).glob("*.json"))
            if status or not files:
                last = next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
                raise ValueError(f"`bench {name}` ended with status {status}: {last[:300]}")
            data: dict[str, Any] = json.loads(files[0].read_text())
            return data


def _figures(row: dict[str, Any], *names: str) -> str:
    return ", ".join(f"{name} {row[name]:.4g}" for name in names)
