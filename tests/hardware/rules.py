"""What a GPU's driver answers where a rule of tests/devices/rules/cuda.toml is broken:

    python -m tests.hardware.rules

Each rule is broken in a process of its own, since some cost the process its context. The table says where the answer is
another one than the file has; the exit status is 1 where that is one which a GPU has given before.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from elasticmoe.cli.bench.report import table
from elasticmoe.common.devices.cuda import REFUSALS, CudaDevice, _CudaDriver
from elasticmoe.common.protocol.errors import DeviceError, ElasticMoEError
from tests.devices import standins
from tests.unit.test_devices_cuda import BREACHES, RULES

_SECONDS = 60
_AT_ONCE = 6


class OneProcess:
    """Owner and user are the same process, on the first GPU."""

    def __init__(self) -> None:
        self.owner = self.user = _CudaDriver(CudaDevice.library)
        self.owner.open(0)


def answer_to(name: str) -> str:
    """What the driver said when that rule was broken."""
    breaches: dict[str, Callable[[Any], object]] = BREACHES | {
        "memory_of_the_device": lambda pair: pair.owner.create(0, 1 << 40),
        "initialized_first": lambda _: _ask_before_all_else(),
    }
    try:
        breaches[name](OneProcess() if name != "initialized_first" else None)
    except ElasticMoEError as error:
        return f"{error.code}: {error.message}"
    except BaseException as error:
        return f"not asked: {type(error).__name__}: {error}"
    return "nothing: it was allowed"


def _ask_before_all_else() -> None:
    answer = ctypes.CDLL(CudaDevice.library).cuDeviceGetCount(ctypes.byref(ctypes.c_int()))
    if not answer:
        return
    raise DeviceError(f"cuDeviceGetCount answers {answer}, {REFUSALS[answer].name}", code=REFUSALS[answer].code)


def _asked(name: str) -> str:
    command = [sys.executable, "-m", __spec__.name, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return "no answer in time"
    return done.stdout.strip() or f"it ended with {done.returncode}"


def main() -> int:
    """The table, of all rules; with a rule's name, the answer to that one."""
    if len(sys.argv) > 1:
        print(answer_to(sys.argv[1]))
        return 0
    assert standins.KINDS["cuda"] is CudaDevice
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = list(pool.map(_asked, [rule["name"] for rule in RULES]))
    rows = [
        {"rule": rule["name"], "as listed": rule["answer"] in answer, "listed": rule["answer"], "answer": answer}
        for rule, answer in zip(RULES, answers, strict=True)
    ]
    print(table(rows))
    # What needs a second GPU, or is not seen each time, is not `seen`.
    return int(any(rule["code_from"] == "seen" and not row["as listed"] for rule, row in zip(RULES, rows, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
