"""What a device's driver does without us: how fast plain copies are, large ones and those of given sizes.

Run as a process of its own, because who asks loads a driver and makes memory:

    python -m elasticmoe.cli.bench.accel_ceiling '{"devices": ["cuda:0"], "large": 268435456, "sizes": []}'

It prints one object of JSON. `devices`: what is read and what is written, the same where there is one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

from elasticmoe.cli.settings import importing_environment
from elasticmoe.common.devices.base import Device, Handle, Range
from elasticmoe.common.devices.factory import granularity_of, open_device
from elasticmoe.common.devices.names import DeviceCount, DeviceId
from elasticmoe.common.model_spec import round_up

_ROUNDS: Final = 3  # of which the best counts: what others do meanwhile makes none better
_LARGE_COPIES: Final = 10
_TIMEOUT_S: Final = 300.0


def measure_ceiling(devices: Sequence[str], large: int, sizes: Sequence[int] = ()) -> dict[str, Any]:
    """The object, from a process. `large`: bytes of a large copy; `sizes`: of small ones,
    each rounded up as handles are. Raises ValueError with what the process said last."""
    asked = json.dumps({"devices": list(devices), "large": large, "sizes": list(sizes)})
    process = subprocess.run(
        [sys.executable, "-m", "elasticmoe.cli.bench.accel_ceiling", asked],
        env=importing_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["it said nothing"]
        raise ValueError(f"plain copies could not be measured: {lines[-1][:300]}")
    found: dict[str, Any] = json.loads(process.stdout)
    return found


class _Buffers:
    """One to read, one to write, of `nbytes` each. `devices`: of these two."""

    def __init__(self, devices: Sequence[Device], nbytes: int) -> None:
        self.nbytes = nbytes
        self._made: list[tuple[Device, Handle, Range]] = []
        for device in devices:
            handle = device.create(nbytes, "kv")
            range_ = device.reserve(nbytes)
            device.map(range_, 0, handle, True)
            self._made.append((device, handle, range_))

    def copy(self, sizes: Sequence[int]) -> float:
        """Seconds for copies of these sizes, one behind the other through the buffers, queued at once."""
        source, (target, _, target_range) = self._made[0][2].base, self._made[1]
        at, parts = 0, []
        for size in sizes:
            at = at if at + size <= self.nbytes else 0
            parts.append((target_range.base + at, source + at, size))
            at += size
        begun = time.perf_counter()
        target.copy_async(parts).wait()
        return time.perf_counter() - begun

    def close(self) -> None:
        """Give all back."""
        for device, handle, range_ in self._made:
            device.unmap(range_, 0)
            device.unreserve(range_)
            device.retire(handle)
            device.reclaim(handle, 0, handle.nbytes)
            device.release(handle)


def _best(devices: Sequence[Device], nbytes: int, sizes: Sequence[int]) -> float:
    """Bytes per second."""
    buffers = _Buffers(devices, nbytes)
    buffers.copy(sizes)
    seconds = min(buffers.copy(sizes) for _ in range(_ROUNDS))
    buffers.close()
    return sum(sizes) / seconds


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """The object."""
    names: list[str] = asked["devices"]
    count = DeviceCount.with_all([DeviceId.parse(name) for name in names])
    granularity = granularity_of(count, 0)
    large, sizes = round_up(asked["large"], granularity), [round_up(size, granularity) for size in asked["sizes"]]
    room = round_up(min(max(large, *sizes), sum(sizes)), granularity) if sizes else 0
    opened = {name: open_device(name, granularity, 2 * max(large, room)) for name in names}
    first, last = opened[names[0]], opened[names[-1]]
    copied = _best((first, first), large, [large] * _LARGE_COPIES)
    found = {"large_bytes": large, "large_bytes_per_s": copied, "memory_bytes_per_s": 2 * copied}
    if sizes:
        found |= {"sizes": len(sizes), "bytes": sum(sizes), "bytes_per_s": _best((first, last), room, sizes)}
    for device in opened.values():
        device.close()
    return found


if __name__ == "__main__":
    sys.stdout.buffer.write(json.dumps(main(json.loads(sys.argv[1]))).encode() + b"\n")
