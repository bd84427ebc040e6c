"""`elasticmoe bench accel`: what accelerators here do, from the memory of one to a deployment that is resized.

| step | what it is | right where |
|---|---|---|
| contract | the self-test of `doctor --device`, in real processes | no step of it fails |
| parity | greedy answers beside those of a `host` deployment of torch | logprobs agree until tokens differ |
| oracle | the same answers while it is resized between one replica and two | each token and logprob is equal |
| attach | `bench attach` of a model with a size | it ends well |
| scaling | that model grows to two replicas under load and shrinks; plain copies beside it | no request fails |
| decode | `bench serve` of it, with 1, 8 and 32 streams; plain copies beside it | it ends well |
| exchange | scripts/exchange_cost.py between two devices, in a checkout | the exchanges bring the same bits |

Parity is in float32. `torch_npu` promises no bits and takes no float32 (ADR 38): with it parity is in bfloat16, which
torch rounds activations to as well, and the oracle is right where answers before and after agree as those of parity do.

Every step runs, whatever the others say. Some measure what there is an aim for (accel_aims.py), which is met, missed or
not measured: a step that ends well may miss it. One table, and one file with the hardware, the versions and the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec

from elasticmoe.cli.arguments import whole
from elasticmoe.cli.bench.accel_aims import BATCHES, Aim, all_aims, attach_aim, copies_aim, decode_aim, flip_aim
from elasticmoe.cli.bench.accel_answers import answers_of, difference, promise_of
from elasticmoe.cli.bench.accel_ceiling import measure_ceiling
from elasticmoe.cli.bench.accel_floor import copied_sizes, step_bytes
from elasticmoe.cli.bench.accel_resize import resize
from elasticmoe.cli.bench.accel_sized import PROMPT_TOKENS, SizedModel, find_sized
from elasticmoe.cli.bench.deployment import COMMAND, first_of, running
from elasticmoe.cli.bench.report import add_output, provenance, table, write_raw
from elasticmoe.cli.doctor_facts import facts
from elasticmoe.cli.doctor_process import TestProcess
from elasticmoe.cli.doctor_selftest import SelfTest
from elasticmoe.cli.endings import run_command
from elasticmoe.cli.finding import Finding
from elasticmoe.cli.paths import package_root
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
_RESIZES: Final = 4
_CLIENTS: Final = 8  # while it is resized
_COST: Final = package_root() / "scripts" / "exchange_cost.py"
_LARGE_SHARE: Final = 4  # of a device's budget: as large as a large copy is
STEPS: Final = ("contract", "parity", "oracle", "attach", "scaling", "decode", "exchange")
Step = Callable[[], tuple[bool, str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench accel`."""
    add = parser.add_argument
    add("--devices", default="", help="such as npu:0-1 or cuda:0/2 (default: the first two, or both halves of one)")
    add("--model", default="tiny-mixtral", help="name or path")
    add("--device-memory", type=parse_size, default=1 << 30, metavar="SIZE", help="budget of each device")
    add(
        "--sized-model",
        default="qwen3-moe-1b",
        metavar="MODEL",
        help="name or path, of what attach, scaling and decode measure (qwen3-moe-1b)",
    )
    add("--output-tokens", type=whole(2, 4096), default=96, help="tokens of each answer of scaling and decode")
    add("--compute", choices=sorted({one for kind in _KINDS for one in COMPUTES[kind]}), help="what computes there")
    add("--steps", default="all", help=f"comma-separated, of {', '.join(STEPS)}")
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
    steps: dict[str, Step] = {name: getattr(accelerators, name) for name in STEPS}
    wanted = (
        [name for name in STEPS if name != "exchange" or _COST.is_file()]
        if args.steps == "all"
        else args.steps.split(",")
    )
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
    aims = all_aims(accelerators.aims, {row["step"]: row["result"] for row in rows})
    driver = accelerators.driver()
    told = [{"step": f"{one['aim']}: {one['wanted']}", "result": one["result"], "found": one["found"]} for one in aims]
    say(table([*rows, *told]))
    data: dict[str, Any] = {"provenance": provenance(" ".join(["elasticmoe", *sys.argv[1:]]))}
    data |= {"devices": str(accelerators.devices), "driver": driver}
    data |= {"installed": [asdict(one) for one in accelerators.installed()], "rows": rows, "aims": aims, "raw": raw}
    if driver.get("is_vendors") is False:
        say("these are figures of no device: another library stands in for the vendor's driver")
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
        self._promise = promise_of(args.compute or "")
        if args.compute:
            self._settings["compute"] = args.compute
        self._sized_name, self._output_tokens = args.sized_model, args.output_tokens
        self._sized: SizedModel | None = None
        self.aims: dict[str, Aim] = {}

    def driver(self) -> dict[str, Any]:
        """What it says of itself and of the first device; `is_vendors`: not where another library stands in for it."""
        try:
            with TestProcess(self.devices.names()[0]) as process:
                told: dict[str, Any] = process.ask("open")
        except ElasticMoEError as error:
            return {"reason": error.message}
        library = Path(told["library"])  # a vendor's is found by its name alone
        return told | {"library": library.name, "is_vendors": library.name == told["library"]}

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
        dtype, activations, most_allowed, _ = self._promise
        with running(self._model, 1, devices=first_of(str(self.devices), 1), dtype=dtype, **self._settings) as ours:
            mine = answers_of(ours.url)
        with running(self._model, 1, dtype=dtype, activations=activations, compute="torch") as theirs:
            reference = answers_of(theirs.url)
        most, num_equal = difference(mine, reference)
        text = (
            f"{num_equal} of {len(mine)} answers have the same tokens in {dtype}; logprobs differ by at most {most:.2g}"
        )
        data = {"dtype": dtype, "most": most, "most_allowed": most_allowed, "equal": num_equal, "answers": len(mine)}
        return most <= most_allowed, text, data

    def oracle(self) -> tuple[bool, str, Any]:
        """See the module's text."""
        if self.devices.count < 2:
            raise ValueError("a deployment that is resized needs two devices")
        with running(self._model, 2, devices=first_of(str(self.devices), 2), **self._settings) as deployment:
            before, changed, most = answers_of(deployment.url), 0, 0.0
            for turn in range(_RESIZES):
                where = ["--replicas", str(1 + turn % 2), "--wait", "--run-dir", str(deployment.run_dir)]
                subprocess.run([*COMMAND, "scale", *where], check=True, timeout=_STEP_S, stdout=subprocess.DEVNULL)
                after = answers_of(deployment.url)
                changed += sum(a != b for a, b in zip(before, after, strict=True))
                most = max(most, difference(before, after)[0])
        text = f"{changed} of {_RESIZES * len(before)} answers changed in {_RESIZES} resizes"
        is_right = changed == 0
        if not self._promise.keeps_bits:
            text += f", logprobs by at most {most:.2g}: no bits are promised"
            is_right = most <= self._promise.logprobs_max
        return is_right, text, {"resizes": _RESIZES, "answers": len(before), "changed": changed, "most": most}

    def _model_of_size(self) -> SizedModel:
        """Made when it is first wanted."""
        if self._sized is None:
            self._sized = find_sized(self._sized_name, self._output_tokens, self._settings)
        return self._sized

    def attach(self) -> tuple[bool, str, Any]:
        """See the module's text."""
        sized = self._model_of_size()
        words = ["--models", sized.path, "--deployments", "1", "--kills", "3"]
        rows = self._bench("attach", 2, *words, settings=sized.settings)["rows"]
        self.aims["attach"] = attach_aim(rows[0]["attach ms median"])
        return True, _figures(rows[0], "attach ms median", "serving again ms median"), rows

    def scaling(self) -> tuple[bool, str, Any]:
        """See the module's text."""
        sized, where = self._model_of_size(), first_of(str(self.devices), 2)
        ran = resize(sized.path, where, sized.settings, clients=_CLIENTS, output_tokens=self._output_tokens)
        watched = [operation["watched"] for operation in ran.operations]
        flips = [one["flip_gap_ms"] for one in watched if one["flip_gap_ms"] is not None]
        if len(flips) == len(watched):
            step_ms = ran.figures[0].gap_p50_ms
            self.aims["flip"] = flip_aim(step_ms, [one.pause_ms for one in ran.figures], flips)
        grown = ran.operations[0]
        sizes = copied_sizes(sized.spec, grown["planned"]["experts_moved"])
        ceiling = measure_ceiling(DeviceCount.parse(where).names()[:2], self._large, sizes)
        nbytes = int(grown["figures"]["bytes_copied"])
        self.aims["copies"] = copies_aim(nbytes, watched[0]["copied_s"], ceiling["bytes_per_s"])
        told = [f"{one.direction} {one.done_s:.3g} s, pause {one.pause_ms:.3g} ms" for one in ran.figures]
        failed = sum(one.failed for one in ran.figures)
        data = {"model": sized.facts, "run": msgspec.to_builtins(ran), "ceiling": ceiling}
        return failed == 0, f"{'; '.join(told)}; {counted(failed, 'request')} failed", data

    def decode(self) -> tuple[bool, str, Any]:
        """See the module's text. A stream's context grows by half of its answer in the mean."""
        sized = self._model_of_size()
        words = ["--models", sized.path, "--replicas", "1", "--concurrency", ",".join(map(str, BATCHES))]
        words += ["--prompt-tokens", str(PROMPT_TOKENS), "--output-tokens", str(self._output_tokens), "--rounds", "1"]
        rows = self._bench("serve", 1, *words, settings=sized.settings)["rows"]
        ceiling = measure_ceiling(self.devices.names()[:1], self._large)
        floors = {}
        for row in rows:
            batch = row["concurrency"]
            read = floors[batch] = step_bytes(sized.spec, batch, PROMPT_TOKENS + self._output_tokens / 2)
            found = decode_aim(row["TPOT p50 ms"], read.total, ceiling["memory_bytes_per_s"])
            self.aims[f"decode, batch {batch}"] = found
        data = {"model": sized.facts, "rows": rows, "ceiling": ceiling}
        data["floors"] = [{"batch": batch, **read._asdict()} for batch, read in floors.items()]
        return True, "; ".join(_figures(row, "concurrency", "tokens/s best") for row in rows), data

    def exchange(self) -> tuple[bool, str, Any]:
        """See the module's text."""
        words = ["--rows", ",".join(map(str, BATCHES)), "--hidden", "2048"]
        words += ["--compute", self._settings["compute"]] if "compute" in self._settings else []
        rows = self._written(["-m", f"scripts.{_COST.stem}", *words], 2, self._settings, cwd=package_root())["rows"]
        return True, "; ".join(_exchanged(row) for row in rows if row["rows"] == max(BATCHES)), rows

    @property
    def _large(self) -> int:
        return int(self._settings["device_bytes"]) // _LARGE_SHARE

    def _bench(self, name: str, num: int, *words: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As `_written` of the benchmark of that name."""
        return self._written([*COMMAND[1:], "bench", name, *words], num, settings or self._settings)

    def _written(
        self, words: Sequence[str], num: int, settings: Mapping[str, Any], cwd: Path | None = None
    ) -> dict[str, Any]:
        """What a program of Python's has written, on the first `num` devices, with these settings of deployments.
        Raises ValueError."""
        with tempfile.TemporaryDirectory(prefix="em-accel-") as folder:
            command = [sys.executable, *words, "--devices", first_of(str(self.devices), num)]
            status, said = run_command(
                [*command, "--output", folder],
                env=importing_environment() | environment_of(settings),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout_s=_STEP_S,
            )
            files = sorted(Path(folder).glob("*.json"))
            if status or not files:
                last = next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
                name = " ".join(word for word in words[:4] if not word.startswith("-"))
                raise ValueError(f"`{name}` ended with status {status}: {last[:300]}")
            data: dict[str, Any] = json.loads(files[0].read_text())
            return data


def _figures(row: dict[str, Any], *names: str) -> str:
    return ", ".join(f"{name} {row[name]:.4g}" for name in names)


def _exchanged(row: dict[str, Any]) -> str:
    """Of one exchange on its rows."""
    took = f"{row['µs']:.4g} µs" if row["digests"] else "not measured"
    return f"{row['exchange']} {took}"
